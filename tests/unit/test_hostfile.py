"""Hostfiles of Slurm's variables, of MPI's files and of lists; and what is no list is told in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ds_optim.cluster.hostfile import Host, expand, find_hosts, from_list, read_hostfile, render
from ds_optim.errors import UserError


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", ["node1"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("gpu[08-10,2],login", ["gpu08", "gpu09", "gpu10", "gpu2", "login"]),
        ("r[1-2]n[1-2]-ib", ["r1n1-ib", "r1n2-ib", "r2n1-ib", "r2n2-ib"]),
        ("a.b.c, d", ["a.b.c", "d"]),
    ],
)
def test_ranges(text: str, names: list[str]) -> None:
    assert expand(text, "a test") == names


def test_list() -> None:
    assert render(from_list("node1:8,node2:4")) == "node1 slots=8\nnode2 slots=4\n"
    assert from_list("n[1-2]:2,m:1") == [Host("n1", 2), Host("n2", 2), Host("m", 1)]
    assert from_list("a,b", slots=3) == [Host("a", 3), Host("b", 3)]
    assert from_list("me@n[1-2]:2") == [Host("me@n1", 2), Host("me@n2", 2)]


@pytest.mark.parametrize(
    ("variables", "slots"),
    [
        ({"SLURM_TASKS_PER_NODE": "2(x2),1", "SLURM_NTASKS": "5"}, [2, 2, 1]),
        ({"SLURM_TASKS_PER_NODE": "64(x3)", "SLURM_GPUS_PER_NODE": "8"}, [8, 8, 8]),
        ({"SLURM_TASKS_PER_NODE": "64(x3)", "SLURM_GPUS_ON_NODE": "4"}, [4, 4, 4]),
        ({"SLURM_TASKS_PER_NODE": "4(x3)", "SLURM_NTASKS_PER_NODE": "4", "SLURM_GPUS_PER_NODE": "8"}, [4, 4, 4]),
        ({"SLURM_TASKS_PER_NODE": "64(x3)", "SLURM_GPUS_PER_NODE": "a100:4,h100:2"}, [6, 6, 6]),
    ],
)
def test_slurm(variables: dict[str, str], slots: list[int]) -> None:
    hosts = find_hosts({"SLURM_JOB_NODELIST": "n[1-3]", **variables})
    assert [host.name for host in hosts] == ["n1", "n2", "n3"]
    assert [host.slots for host in hosts] == slots
    assert {host.slots for host in find_hosts({"SLURM_JOB_NODELIST": "n[1-3]", **variables}, slots=7)} == {7}


@pytest.mark.parametrize(
    "text",
    [
        "a slots=2\nb slots=1\n",
        "a\nb\na\n",
        "a:2\nb\n",
        "# two\n\na slots=2 max_slots=4\nb # one\n",
        "a Slots=2\r\nb SLOTS = 1\r\n",
        "a max-slots=4 slots =2 # of four\nb\n",
        "a slots= 1\nb slots=1\na\tslots=1\n",
        "a:2 binding=user:0,1\nb:1 ifname=eth0\n",
    ],
)
def test_host_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    assert read_hostfile(path) == [Host("a", 2), Host("b", 1)]
    assert find_hosts({"PBS_NODEFILE": str(path)}) == [Host("a", 2), Host("b", 1)]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("me@a slots=2\n", "me@a"),
        ("me@a:2\n", "me@a"),
        ("10.0.0.1 slots=2\n", "10.0.0.1"),
        ("2001:db8::1 slots=2\n", "2001:db8::1"),
        ("[2001:db8::1]:2\n", "2001:db8::1"),
        ("me@[2001:db8::1]:2\n", "me@2001:db8::1"),
        ("fe80::1%eth0 slots=2\n", "fe80::1%eth0"),
    ],
)
def test_what_is_read_of_mpi_is_written_as_deepspeed_reads_it(tmp_path: Path, text: str, name: str) -> None:
    from deepspeed.launcher.runner import _parse_hostfile

    path = tmp_path / "hosts"
    path.write_text(text)
    written = render(read_hostfile(path))
    assert dict(_parse_hostfile(written.splitlines())) == {name: 2}
    path.write_text(written)
    assert render(read_hostfile(path)) == written


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a slots=1\nb lots=8\n", "line 2: 'lots=8' is unknown (did you mean 'slots'?); write 'b slots=N'"),
        ("a slot=8\n", "line 1: 'slot=8' is unknown (did you mean 'slots'?)"),
        ("a 8\n", "line 1: '8' is unknown; write 'a slots=N'"),
        ("a user=me slots=2\n", "line 1: 'user=me' is unknown; write 'a slots=N'"),
        ("a slots=8 slots=4\n", "line 1: 'a slots=8 slots=4' says twice how many slots"),
        ("a:8 slots=4\n", "says twice how many slots"),
        ("a max_slots=8\n", "says how many slots at most, not how many"),
        ("a slots=\n", "line 1: '' is no number of ranks"),
        ("a slots=8.0\n", "line 1: '8.0' is no number of ranks"),
        ("a slots=-8\n", "line 1: '-8' is no number of ranks"),
        ("a:\n", "line 1: '' is no number of ranks"),
        ("^a\n", "'^a' is no name of a host"),
        ("2001:db8::g slots=1\n", "'2001:db8::g' is no name of a host"),
        ("me@a slots=1\na slots=1\n", "a stands there twice"),
        ("\xff\n", "no name of a host"),
    ],
)
def test_mistakes_in_a_host_file(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        find_hosts({"PBS_NODEFILE": str(path)}, "mpi")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_host_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot read the hostfile .*: no text"):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "no nodes: write a list such as node1:8,node2:8"),
        ("a", "write a:8, or give --slots 8"),
        ("a:0", "'0' is no number of ranks"),
        ("a:x", "'x' is no number of ranks"),
        ("a:1,a:2", "a stands there twice"),
        ("a;b:1", "'a;b' is no name of a host"),
        ("n[3-1]:1", "[3-1] in the list of nodes is no range"),
        ("n[1-2:1", "a bracket without its other half"),
    ],
)
def test_mistakes_in_a_list(text: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        from_list(text)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_in_a_job(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no Slurm or MPI job"):
        find_hosts({})
    with pytest.raises(UserError, match="SLURM_JOB_NODELIST is not set"):
        find_hosts({}, "slurm")
    with pytest.raises(UserError, match="is for 2 nodes and SLURM_JOB_NODELIST has 3"):
        find_hosts({"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_TASKS_PER_NODE": "2(x2)"})
    with pytest.raises(UserError, match="no MPI job"):
        find_hosts({}, "mpi")
    with pytest.raises(UserError, match="cannot read the hostfile"):
        find_hosts({"PBS_NODEFILE": str(tmp_path / "missing")})
    path = tmp_path / "hosts"
    path.write_text("a slots=many\n")
    with pytest.raises(UserError, match="line 1: 'many' is no number"):
        read_hostfile(path)


@pytest.mark.full
def test_command(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ds_optim", "hostfile", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = run("node[1-2]:2")
    assert (done.returncode, done.stdout) == (0, "node1 slots=2\nnode2 slots=2\n")
    done = run("node1:2,node2:1", "--out", str(tmp_path / "h"))
    assert done.stdout.endswith("h: 2 nodes, 3 ranks\n")
    assert (tmp_path / "h").read_text() == "node1 slots=2\nnode2 slots=1\n"
    done = run("node1")
    assert done.returncode == 2
    assert done.stderr.startswith("ds-optim: error: 'node1' in the list of nodes has no number of ranks")
