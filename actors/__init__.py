"""Ray actors: each unpacks, calls a function of `rlsf_ray`, and wraps the result."""
