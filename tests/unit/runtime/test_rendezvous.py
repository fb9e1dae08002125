"""The rank of a process in its job, from the variables of its launcher."""

from __future__ import annotations

import socket

import pytest

from weakclip.runtime.rendezvous import first_host, variables

STEP = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
}

SUBMITIT = {
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1",
    "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_JOB_ID": "123456",
}


def test_what_torchrun_says_stands_in_a_job_of_slurms_too():
    assert variables({"RANK": "3", "WORLD_SIZE": "4"}) == variables({"RANK": "3", **STEP}) == {}


def test_a_task_of_a_step_is_a_rank():
    found = variables(STEP)
    assert found.pop("MASTER_PORT").isdigit()
    assert found == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu003"}


def test_all_tasks_of_a_step_meet_in_the_same_place():
    ranks = [variables(STEP | {"SLURM_PROCID": rank}) for rank in "01234567"]
    assert len({(rank["MASTER_ADDR"], rank["MASTER_PORT"]) for rank in ranks}) == 1


def test_a_process_of_submitits_local_launcher_is_a_rank_of_this_machine():
    found = variables(SUBMITIT)
    assert found.pop("MASTER_PORT").isdigit()
    assert found == {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu[1-2]"},
        STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        SUBMITIT | {"SUBMITIT_LOCAL_NTASKS": "1"},
    ],
    ids=["no launcher", "batch script", "step of one task", "one local task"],
)
def test_a_process_by_itself_is_alone_at_a_port_that_is_free(environment):
    found = variables(environment)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(found.pop("MASTER_PORT"))))
    assert found == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("one", "one"),
        ("one,two", "one"),
        ("gpu[003-005,9],login", "gpu003"),
        ("gpu[7,9-11]", "gpu7"),
        ("gpu[7]", "gpu7"),
        ("login,gpu[003-005]", "login"),
        ("gpu-a[1-4]-ib,gpu-b1", "gpu-a1-ib"),
        ("r[1-2]n[01-04]", "r1n01"),
        ("127.0.0.[1-2]", "127.0.0.1"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_two_jobs_on_a_node_meet_at_two_ports():
    ports = {variables(STEP | {"SLURM_JOB_ID": str(job)})["MASTER_PORT"] for job in range(900, 1000)}
    assert len(ports) == 100


@pytest.mark.parametrize("job", [1, 9_999, 22_768, 65_536, 2**31 - 1])
def test_the_port_lies_below_those_of_outgoing_connections(job):
    assert 1024 < int(variables(STEP | {"SLURM_JOB_ID": str(job)})["MASTER_PORT"]) < 32_768
