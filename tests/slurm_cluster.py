"""A real Slurm on this machine: a controller and two nodes of their own, in a folder of their own, without systemd.

Needs Debian's `slurmctld slurmd slurm-client munge`, root, and the names node1 and node2 (`.ci/run` sees to all three).
"""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
# Lightning takes a job's last four digits for the port at which its ranks meet: clusters side by side share none.
FirstJobId={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
# As on a cluster whose jobs come back: at once, and not after two minutes.
SchedulerParameters=requeue_delay=1,batch_sched_delay=0,sched_interval=2,defer=0
KillWait=20
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
# Jobs for `urgent` push others aside, which get a time of grace.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# What the files in slurm/ ask for; there is no more of it than of anything else.
GresTypes=gpu
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=node1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=48 RealMemory=1000000 Gres=gpu:8 State=UNKNOWN
NodeName=node2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=48 RealMemory=1000000 Gres=gpu:8 State=UNKNOWN
PartitionName=debug Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node1,node2 MaxTime=INFINITE State=UP PriorityTier=2
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")


def why_not() -> str | None:
    """Return what is missing for a cluster here, None if nothing is."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no Slurm here: {', '.join(missing)} not installed"
    if os.geteuid() != 0:
        return "starting a Slurm takes root"
    try:
        for name in ("node1", "node2"):
            socket.gethostbyname(name)
    except OSError:
        return "node1 and node2 are no names of this machine; add them to /etc/hosts at 127.0.0.1"
    return None


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


class Cluster:
    """Running daemons; `environment` makes Slurm's commands talk to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state").mkdir(exist_ok=True)
        # Munge wants folders that nobody else can write to, and none above them either.
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        configuration = folder / "slurm.conf"
        host = socket.gethostname().split(".")[0]
        configuration.write_text(CONFIGURATION.format(folder=folder, host=host, ports=free_ports(3)))
        for number in range(8):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"NodeName=node[1-2] Name=gpu File={folder}/gpu[0-7]\n")
        self.environment = {"SLURM_CONF": str(configuration)}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        socket_file = f"{self.folder}/munge.socket"
        self._run(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={self.folder}/munge.key",
            f"--socket={socket_file}",
            f"--pid-file={self.folder}/munged.pid",
            f"--log-file={self.folder}/munged.log",
            f"--seed-file={self.folder}/munged.seed",
        )
        self._until(lambda: Path(socket_file).exists(), "munged")
        self._run("slurmctld", "-D")
        self._run("slurmd", "-D", "-N", "node1")
        self._run("slurmd", "-D", "-N", "node2")
        self._until(lambda: self.ask("sinfo", "-h", "-p", "debug", "-o", "%D %t").strip() == "2 idle", "the nodes")

    def stop(self) -> None:
        subprocess.run(
            ["scancel", "--user=root", "--signal=KILL", "--full"], env=os.environ | self.environment, check=False
        )
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def ask(self, *words: str, check: bool = True, cwd: Path | None = None, **variables: str) -> str:
        """Run one of Slurm's commands and return what it printed."""
        done = subprocess.run(
            words,
            env=os.environ | self.environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=cwd,
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """Return what `scontrol show job` says of a job."""
        said = self.ask("scontrol", "show", "job", str(number), "-o", check=False)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def _run(self, *words: str) -> None:
        log = (self.folder / f"{len(self._daemons)}-{words[0]}.out").open("w")
        self._daemons.append(
            subprocess.Popen(words, env=os.environ | self.environment, stdout=log, stderr=log, cwd=self.folder)
        )

    def _until(self, done, what: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, f"{what} did not come up; see {self.folder}"
            time.sleep(0.2)
