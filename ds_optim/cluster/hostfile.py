"""Hostfiles (``node1 slots=8``, a line a node) of what a batch system, MPI or a user says of the nodes of a job."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ds_optim.errors import UserError, did_you_mean

#: Files in which a batch system or an MPI names a job's hosts; in most of them a line is a slot.
HOST_FILES = (
    "PBS_NODEFILE",
    "LSB_DJOB_HOSTFILE",
    "HYDRA_HOST_FILE",
    "I_MPI_HYDRA_HOST_FILE",
    "OMPI_MCA_orte_default_hostfile",
    "PRTE_MCA_prte_default_hostfile",
)
_MPI_SIZE = "OMPI_COMM_WORLD_SIZE"
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_MOST = 100_000
"""Of nodes and of ranks of one: more are a typing error, and would take long to write."""
_USER = re.compile(r"[A-Za-z0-9._-]+@")
#: What OpenMPI and MPICH may say of a host beside its slots, and what changes nothing here.
_BESIDE = ("max_slots", "slots_max", "binding", "ifname")


@dataclass(frozen=True)
class Host:
    """A node and the ranks that it takes."""

    name: str
    slots: int


def render(hosts: Iterable[Host]) -> str:
    """The text of a hostfile as DeepSpeed and OpenMPI read it."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


def find_hosts(environment: Mapping[str, str], source: str | None = None, slots: int | None = None) -> list[Host]:
    """The hosts of the job that this process belongs to.

    Args:
        source: ``slurm`` or ``mpi``; None takes the one that has left its variables.
        slots: ranks of each node, over what the job says.

    Raises UserError where nothing names them, or not clearly.
    """
    if source == "slurm" or (source is None and "SLURM_JOB_NODELIST" in environment):
        return from_slurm(environment, slots)
    if source == "mpi" or any(name in environment for name in (_MPI_SIZE, *HOST_FILES)):
        return from_mpi(environment, slots)
    raise UserError(
        "this is no Slurm or MPI job: run it inside one, or name the nodes: ds-optim hostfile node1:8,node2:8"
    )


def from_slurm(environment: Mapping[str, str], slots: int | None = None) -> list[Host]:
    """The nodes of a Slurm job, with its tasks on each; where no number of tasks was asked for, with its GPUs."""
    nodes = environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise UserError("SLURM_JOB_NODELIST is not set: run it inside a job (sbatch or salloc)")
    names = expand(nodes, "SLURM_JOB_NODELIST")
    if slots is not None:
        return checked([Host(name, slots) for name in names])
    tasks = environment.get("SLURM_TASKS_PER_NODE", "1")
    gpus = environment.get("SLURM_GPUS_PER_NODE") or environment.get("SLURM_GPUS_ON_NODE")
    asked = "SLURM_NTASKS" in environment or "SLURM_NTASKS_PER_NODE" in environment
    counts = _gpus(gpus, len(names)) if gpus and not asked else _tasks(tasks)
    if len(counts) != len(names):
        raise UserError(
            f"SLURM_TASKS_PER_NODE={tasks} is for {len(counts)} nodes and SLURM_JOB_NODELIST has {len(names)}:"
            " give --slots N"
        )
    return checked([Host(name, count) for name, count in zip(names, counts, strict=True)])


def from_mpi(environment: Mapping[str, str], slots: int | None = None) -> list[Host]:
    """The nodes of an MPI job: of the ranks where ``mpirun`` started this, else of the file that a variable names."""
    if _MPI_SIZE in environment:
        hosts = _counted(_names_of_ranks(int(environment[_MPI_SIZE])))
    else:
        variable = next((name for name in HOST_FILES if environment.get(name)), None)
        if variable is None:
            raise UserError(f"no MPI job: none of {_MPI_SIZE}, {', '.join(HOST_FILES)} is set")
        hosts = read_hostfile(Path(environment[variable]))
    return checked([Host(host.name, slots) for host in hosts] if slots is not None else hosts)


def from_list(text: str, slots: int | None = None) -> list[Host]:
    """The nodes of ``node1:8,node2:8``; names may have ranges (``node[1-4]:8``)."""
    hosts: list[Host] = []
    for part in _split(text):
        names, colon, count = part.partition(":")
        if colon:
            number = _number(count, f"{part!r} in the list of nodes")
        elif slots is not None:
            number = slots
        else:
            raise UserError(f"{part!r} in the list of nodes has no number of ranks: write {part}:8, or give --slots 8")
        hosts += [Host(name, number) for name in expand(names, "the list of nodes")]
    return checked(hosts)


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file with lines ``name slots=N``, ``name:N`` or, once for each slot, ``name``; as in MPI, a host
    on several lines has the slots of all. ``name`` may be ``user@name`` or an address, with ``:N`` ``[address]:N``.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the hostfile {str(path)!r}: {getattr(error, 'strerror', 'no text')}") from None
    counts: dict[str, int] = {}
    for index, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if text:
            host = _host_of(text, f"{path}, line {index}")
            counts[host.name] = counts.get(host.name, 0) + host.slots
    return checked([Host(name, count) for name, count in counts.items()])


def _host_of(text: str, where: str) -> Host:
    """The host of a line. What is not understood is an error: a slot too few is ranks that never start."""
    first, *words = re.sub(r"\s*=\s*", "=", text).split()
    name, count = _address(first)
    for word in words:
        key, equals, value = word.partition("=")
        known = key.lower().replace("-", "_")
        if not equals or known not in ("slots", *_BESIDE):
            near = did_you_mean(known, ["slots"]) if equals else ""
            raise UserError(f"{where}: {word!r} is unknown{near}; write '{name} slots=N'")
        if known == "slots" and count is not None:
            raise UserError(f"{where}: {text!r} says twice how many slots; write '{name} slots=N'")
        count = value if known == "slots" else count
    if count is None and any(word.partition("=")[0] not in ("binding", "ifname") for word in words):
        raise UserError(f"{where}: {text!r} says how many slots at most, not how many; write '{name} slots=N'")
    return Host(name, _number("1" if count is None else count, where))


def _address(word: str) -> tuple[str, str | None]:
    """``name``, ``name:N``, an IPv6 address or ``[address]:N``, and the N of it."""
    bracketed = re.fullmatch(r"((?:[^@]*@)?)\[([^\[\]]*)\](?::(.*))?", word)
    if bracketed is not None:
        return bracketed[1] + bracketed[2], bracketed[3]
    name, colon, count = word.partition(":")
    return (word, None) if word.count(":") > 1 else (name, count if colon else None)


def checked(hosts: list[Host]) -> list[Host]:
    """``hosts``, if a launcher can start them; raises UserError if not."""
    if not hosts:
        raise UserError("no nodes: write a list such as node1:8,node2:8")
    seen: set[str] = set()
    for host in hosts:
        name = _USER.sub("", host.name, count=1)
        if not _NAME.fullmatch(name) and not _is_ipv6(name):
            raise UserError(f"{host.name!r} is no name of a host")
        if host.slots < 1:
            raise UserError(f"{host.name} has {host.slots} ranks; write 1 or more")
        if name in seen:
            raise UserError(f"{name} stands there twice; write it once, with all its ranks")
        seen.add(name)
    return hosts


def _is_ipv6(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).version == 6
    except ValueError:
        return False


def expand(text: str, where: str) -> list[str]:
    """The names of a host list of Slurm: ``gpu[01-03,7],login`` is gpu01, gpu02, gpu03, gpu7, login."""
    names: list[str] = []
    for part in _split(text):
        pieces = re.split(r"\[([^\[\]]*)\]", part)
        if any("[" in piece or "]" in piece for piece in pieces[::2]):
            raise UserError(f"{part!r} in {where} has a bracket without its other half")
        choices = [_range(piece, where) if index % 2 else [piece] for index, piece in enumerate(pieces)]
        names += ["".join(choice) for choice in product(*choices)]
    return names


def _split(text: str) -> list[str]:
    """Parts between the commas that stand in no bracket."""
    return [part.strip() for part in re.split(r",(?![^\[\]]*\])", text) if part.strip()]


def _range(text: str, where: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise UserError(f"[{text}] in {where} is no range; write such as [1-4,7]")
        if int(last or first) - int(first) > _MOST:
            raise UserError(f"[{text}] in {where} is a range of more than {_MOST:,} nodes")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return numbers


def _tasks(text: str) -> list[int]:
    """Slurm's ``2(x3),1`` is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            raise UserError(f"SLURM_TASKS_PER_NODE={text} is not such as 8(x2): give --slots N")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _gpus(text: str, nodes: int) -> list[int]:
    """Slurm's ``8``, ``a100:8`` or ``a100:4,h100:4``: GPUs of each node."""
    counts = [part.rpartition(":")[2].partition("(")[0] for part in text.split(",")]
    return [sum(_number(count, f"SLURM_GPUS_PER_NODE={text}") for count in counts)] * nodes


def _number(text: str, where: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST:
        raise UserError(f"{where}: {text!r} is no number of ranks; write 1 or more")
    return int(text)


def _counted(names: Iterable[str]) -> list[Host]:
    """Hosts in the order in which they first stand there, with how often they do."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return [Host(name, count) for name, count in counts.items()]


def _names_of_ranks(size: int) -> list[str]:
    """The host of every rank of an MPI job, by rank."""
    if size == 1:
        return [socket.gethostname()]
    try:
        from mpi4py import MPI
    except ImportError:
        raise UserError("mpirun started this, and mpi4py is missing: pip install mpi4py") from None
    names: list[str] = MPI.COMM_WORLD.allgather(MPI.Get_processor_name())
    return names
