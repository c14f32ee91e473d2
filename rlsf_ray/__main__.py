"""`python -m rlsf_ray` is `rlsf`."""

from rlsf_ray.cli import main

if __name__ == "__main__":
    main()
