"""Loggers by name: each record of metrics.jsonl once, also after an abrupt end, and a failure that ends no run.

Real packages are read with other programs' readers where they are installed; MLflow and SwanLab also have stand-ins.
"""

import csv
import struct
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest
import yaml

import qwlit
from qwlit.config.compose import compose
from qwlit.config.groups import conf_dir
from qwlit.core.errors import ConfigError, Preempted
from qwlit.core.files import read_json_lines
from qwlit.run.named_loggers import named_loggers
from qwlit.training.config import LoggerConfig, LoggerName
from qwlit.training.tracking.loggers import LOGGERS, NamedLogger, check_named_loggers
from qwlit.training.tracking.run_folder import RunFolder

SETTINGS = {"seed": 0, "optim": {"lr": 1e-5, "betas": [0.9, 0.95]}, "run": {"name": "数据"}}
Points = list[tuple[str, int, float]]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


def opened(name: str, folder: RunFolder) -> NamedLogger:
    logger = LOGGERS[name](LoggerConfig(use=name), folder)  # type: ignore[arg-type]
    logger.open(SETTINGS)
    return logger


def train(logger: NamedLogger, folder: RunFolder, steps: range) -> None:
    for step in steps:
        record: dict[str, float | None] = {"train/loss": 1 / step, "throughput/mfu": None}
        if step % 3 == 0:
            record = {"val/loss": 2 / step}
        folder.append_metrics(step, record)
        logger.log(step, record)


def expected(folder: RunFolder) -> Points:
    records = read_json_lines(folder.path / "metrics.jsonl")
    return [(n, r["step"], v) for r in records for n, v in r.items() if n != "step" and v is not None]


def tensorboard_events(folder: RunFolder) -> list[Any]:
    """Read the records of TensorFlow's format: length (8 bytes), checksum (4), event, checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    data, events = b"".join(f.read_bytes() for f in (folder.path / "tensorboard").glob("events.out.tfevents.*")), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def tensorboard_points(folder: RunFolder) -> Points:
    values = [(value, event.step) for event in tensorboard_events(folder) for value in event.summary.value]
    return [(value.tag, step, value.simple_value) for value, step in values if value.HasField("simple_value")]


def csv_points(folder: RunFolder) -> Points:
    with (folder.path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [(n, int(row["step"]), float(v)) for row in rows for n, v in row.items() if n != "step" and v]


def mlflow_points(folder: RunFolder) -> Points:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder.path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("qwlit").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run" and run.data.params["optim/lr"] == "1e-05"
    return [
        (m.key, m.step, m.value) for key in run.data.metrics for m in client.get_metric_history(run.info.run_id, key)
    ]


class MlflowStandIn:
    """Stands in for Lightning's MLFlowLogger and the server's client."""

    runs: dict[str, "MlflowStandIn"]

    def __init__(self, experiment: str, name: str, *, tracking_uri: str, run_id: str | None) -> None:
        self.run_id = run_id or f"id{len(self.runs)}"
        self.stored: MlflowStandIn = self.runs.setdefault(self.run_id, self)
        if self.stored is self:
            self.points: Points = []
            self.params: list[Any] = []
        self.experiment = self
        self.where = (experiment, name, tracking_uri)

    def log_hyperparams(self, settings: Any) -> None:
        self.stored.params.append(settings)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.stored.points += [(name, step, value) for name, value in metrics.items()]

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(metrics={name for name, _, _ in self.stored.points}))

    def get_metric_history(self, run_id: str, key: str) -> Any:
        return [SimpleNamespace(step=step) for name, step, _ in self.stored.points if name == key]

    def update_run(self, run_id: str, *, status: str) -> None:
        self.stored.status = status

    def finalize(self, status: str) -> None:
        self.stored.status = status


def swanlab_stand_in(monkeypatch: pytest.MonkeyPatch, *, mode: str, api_key: str | None) -> list[dict[str, Any]]:
    """Stand in for the package swanlab; return what it gets, one dict a logger that was opened."""
    launches: list[dict[str, Any]] = []

    class SwanLabLogger:
        version = "id0"

        def __init__(self, **options: Any) -> None:
            launches.append({"options": options, "points": []})

        def log_hyperparams(self, settings: Any) -> None:
            launches[-1]["settings"] = settings

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            launches[-1]["points"] += [(name, step, value) for name, value in metrics.items()]

    package, integration = ModuleType("swanlab"), ModuleType("pytorch_lightning")
    package.Settings = lambda **options: SimpleNamespace(mode=mode, api_key=api_key)  # type: ignore[attr-defined]
    package.finish = lambda state: launches[-1].update(state=state)  # type: ignore[attr-defined]
    integration.SwanLabLogger = SwanLabLogger  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swanlab", package)
    monkeypatch.setitem(sys.modules, "swanlab.integration", ModuleType("integration"))
    monkeypatch.setitem(sys.modules, "swanlab.integration.pytorch_lightning", integration)
    return launches


def resumed(name: str, folder: RunFolder) -> None:
    """Log steps 1 to 6, end abruptly, resume from a checkpoint of step 4, and log to step 8."""
    train(opened(name, folder), folder, range(1, 7))
    folder.drop_records_after(4)
    second = opened(name, folder)
    train(second, folder, range(5, 9))
    second.close("done")


@pytest.mark.parametrize(
    ("name", "points"), [("tensorboard", tensorboard_points), ("csv", csv_points), ("mlflow", mlflow_points)]
)
def test_a_resumed_run_has_every_record_once(name: str, points: Any, folder: RunFolder) -> None:
    if name == "mlflow":
        pytest.importorskip("mlflow")
    resumed(name, folder)
    found, wanted = sorted(points(folder)), sorted(expected(folder))
    assert [point[:2] for point in found] == [point[:2] for point in wanted]
    assert [point[2] for point in found] == pytest.approx([point[2] for point in wanted], rel=1e-6)


def test_mlflow_continues_one_run_and_gets_every_record_and_all_settings_once(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MlflowStandIn, "runs", {}, raising=False)
    monkeypatch.setattr("lightning.pytorch.loggers.MLFlowLogger", MlflowStandIn)
    resumed("mlflow", folder)
    (run,) = MlflowStandIn.runs.values()
    assert sorted(run.points) == sorted(expected(folder))
    assert run.params == [SETTINGS] and run.status == "FINISHED"
    assert run.where == ("qwlit", "run", f"sqlite:///{folder.path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert LOGGERS["mlflow"](LoggerConfig(project="p"), folder).connect({})[0].where == ("p", "run", "http://server")


@pytest.mark.parametrize(("mode", "key", "used"), [("online", None, "offline"), ("local", "key", "local")])
def test_swanlab_without_a_server_gets_all_records_in_the_newest_launch(
    mode: str, key: str | None, used: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = swanlab_stand_in(monkeypatch, mode=mode, api_key=key)
    resumed("swanlab", folder)
    assert launches[-1]["points"] == expected(folder) and launches[-1]["settings"] == SETTINGS
    assert launches[-1]["state"] == "success" and launches[-1]["options"]["mode"] == used
    assert launches[-1]["options"]["log_dir"] == str(folder.path / "swanlab")


def test_swanlab_online_continues_one_run_from_the_checkpoint(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (launches := swanlab_stand_in(monkeypatch, mode="online", api_key="key")), None
    resumed("swanlab", folder)
    first, second = launches
    assert (first["options"]["id"], second["options"]["id"]) == (None, "id0")
    assert [step for _, step, _ in second["points"]] == [5, 6, 7, 8]


def test_tensorboard_and_csv_have_all_settings(folder: RunFolder) -> None:
    for name in ("tensorboard", "csv"):
        opened(name, folder).close("failed")
    assert yaml.safe_load((folder.path / "csv" / "hparams.yaml").read_text()) == SETTINGS
    (text,) = [v for event in tensorboard_events(folder) for v in event.summary.value if v.tag.startswith("settings")]
    assert yaml.safe_load(text.tensor.string_val[0].decode().strip("`")) == SETTINGS


def test_a_logger_that_fails_is_noted_once_and_the_others_go_on(folder: RunFolder, capsys: Any) -> None:
    broken, whole = opened("csv", folder), opened("tensorboard", folder)
    broken._logger.log_metrics = lambda *_: 1 / 0  # type: ignore[union-attr]
    for logger in (broken, whole):
        train(logger, folder, range(1, 3))
        logger.close("done")
    (event,) = read_json_lines(folder.path / "events.jsonl")
    assert event["message"] == "logger=csv failed (division by zero); metrics.jsonl has every record"
    assert event["step"] == 1 and capsys.readouterr().out.count("logger=csv failed") == 1
    assert Counter(name for name, _, _ in tensorboard_points(folder)) == {"train/loss": 2}


def test_a_logger_that_cannot_be_opened_is_refused_in_one_line(folder: RunFolder) -> None:
    (folder.path / "csv").write_text("in the way")
    with pytest.raises(ConfigError, match=r"^logger=csv: .*; set logger=none to train without it$"):
        opened("csv", folder)


def test_only_rank_0_logs_and_closes_with_the_runs_result(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(["logger.use=[wandb,csv,csv]"]).config
    endings: list[str] = []
    monkeypatch.setattr(NamedLogger, "close", lambda logger, ending: endings.append(ending))
    with named_loggers(config, folder) as loggers:
        assert [logger.name for logger in loggers] == ["csv"]
    for error in (Preempted("x"), ZeroDivisionError()):
        with pytest.raises(type(error)), named_loggers(config, folder):
            raise error
    assert endings == ["done", "stopped", "failed"]
    monkeypatch.setattr("qwlit.run.named_loggers.is_rank_zero", lambda: False)
    with named_loggers(config, folder) as loggers:
        assert loggers == []


@pytest.mark.parametrize(
    ("name", "modules", "package"),
    [
        ("tensorboard", ["tensorboard", "tensorboardX"], "tensorboard"),
        ("mlflow", ["mlflow"], "mlflow-skinny"),
        ("swanlab", ["swanlab"], "swanlab"),
    ],
)
def test_a_missing_package_is_named(
    name: str, modules: list[str], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    said = rf"^logger={name} needs a package \(.*\); run pip install {package}$"
    with pytest.raises(ConfigError, match=said):
        check_named_loggers(LoggerConfig(use=("csv", name)))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=said):
        qwlit.train("hardware=cpu", f"logger={name}", f"run.root={tmp_path}")


def test_every_logger_has_its_file_and_several_can_be_used_together() -> None:
    assert {*LOGGERS, "wandb"} == set(get_args(LoggerName))
    for name in get_args(LoggerName):
        assert yaml.safe_load((conf_dir() / "logger" / f"{name}.yaml").read_text())["use"] == [name]
    both = compose(["logger.use=[wandb,tensorboard]"]).config.logger
    assert both.use == ("wandb", "tensorboard") and both.wandb
    with pytest.raises(
        ConfigError, match=r"logger\.wandb is now called logger\.use: type logger=wandb, .* by `use: \[wandb\]`"
    ):
        compose(["logger.wandb=true"])
