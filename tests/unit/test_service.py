"""What the driver and the trainer refuse, without Ray."""

import errno

import pytest

from actors.job import Job
from actors.trainer import room_in
from rlsf_ray.errors import InputError, StorageError
from rlsf_ray.service import check_root


def test_a_run_of_the_same_name_in_another_folder_is_refused_with_both_folders() -> None:
    job = Job(run="demo", root="/home/ann/runs/demo", source="", gpus={})
    check_root({"root": "/home/ann/runs/demo"}, job)
    with pytest.raises(InputError, match=r"/home/bob/runs/demo; expected /home/ann/runs/demo; .*--run"):
        check_root({"root": "/home/bob/runs/demo"}, job)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_folder_of_the_checkpoints(number: int) -> None:
    says = r"no room for a checkpoint in /data/run/checkpoints .* free space there"
    with pytest.raises(StorageError, match=says), room_in("/data/run/checkpoints"):
        raise OSError(number, "full")


def test_another_failure_of_the_disk_stays_what_it_is() -> None:
    with pytest.raises(PermissionError), room_in("/data"):
        raise PermissionError(errno.EACCES, "denied")
