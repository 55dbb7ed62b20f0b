"""A W&B server for tests: the client is the real one, the server is this stub on the loopback device.

It answers GraphQL by the operation's name, keeps what runs send, and plays the sweep controller: grid enumerates, bayes
draws, hyperband stops. An operation that it does not know is remembered in `unknown`, and fails the test.
"""

import itertools
import json
import math
import random
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

import yaml

ENTITY = "tester"
KEY = "0123456789abcdef0123456789abcdef01234567"
LONGEST_NAME, LONGEST_TAG = 128, 64
FILES = {"wandb-history.jsonl": "history", "wandb-events.jsonl": "events", "output.log": "output"}
Json = dict[str, Any]


@dataclass
class Run:
    """What the server knows of a run."""

    id: str
    project: str
    sweep: str | None = None
    config: Json = field(default_factory=dict)
    summary: Json = field(default_factory=dict)
    history: list[Json] = field(default_factory=list)
    events: list[Json] = field(default_factory=list)
    output: list[Any] = field(default_factory=list)
    record: Json = field(default_factory=dict)
    """The last UpsertBucket: displayName, groupName, tags, …"""
    state: str = "running"
    exit_code: int | None = None
    preempting: bool = False


@dataclass
class Artifact:
    """A version of an artifact."""

    id: str
    name: str
    type: str
    aliases: list[str]
    run: str
    committed: bool = False
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Sweep:
    """A sweep and its controller."""

    id: str
    project: str
    config: Json
    trials: Iterator[Json]
    alive: dict[str, str] = field(default_factory=dict)
    """Run → the agent that has it."""
    lost: list[str] = field(default_factory=list)
    """Runs whose process has ended without a word."""
    stopped: set[str] = field(default_factory=set)


def draws(config: Json) -> Iterator[Json]:
    """Yield trials: a grid's points in order, else draws without end."""
    parameters = config["parameters"]
    if config["method"] == "grid":
        for values in itertools.product(*(p.get("values", [p.get("value")]) for p in parameters.values())):
            yield dict(zip(parameters, values, strict=True))
        return
    generator = random.Random(0)
    while True:
        yield {name: _draw(parameter, generator) for name, parameter in parameters.items()}


def _draw(parameter: Json, generator: random.Random) -> Any:
    if "values" in parameter:
        return generator.choice(parameter["values"])
    low, high = parameter["min"], parameter["max"]
    if parameter["distribution"] == "log_uniform_values":
        return math.exp(generator.uniform(math.log(low), math.log(high)))
    return generator.uniform(low, high)


class WandbStub:
    """The server, for the time of a `with` block."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.artifacts: list[Artifact] = []
        self.unknown: list[str] = []
        self.operations: list[str] = []
        self.agents: list[str] = []
        """The sweep of each, by its id."""
        self.handed_out: list[tuple[str, str]] = []
        """Commands to agents, run or resume, and the run's id."""
        self._lock = threading.RLock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with stub._lock:
                    status, answer = stub._post(urlsplit(self.path).path, body)
                self._answer(status, answer)

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with stub._lock:
                    stub._store(urlsplit(self.path).path, body)
                self._answer(200, {})

            def do_GET(self) -> None:
                with stub._lock:
                    stub.unknown.append(f"GET {self.path}")
                self._answer(404, {})

            def _answer(self, status: int, answer: Json) -> None:
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *words: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # the client hangs up as it likes

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """Return what makes the client talk to this server, and every second: by itself it collects rows for 15 s."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1",
        }

    def only_run(self) -> Run:
        (run,) = self.runs.values()
        return run

    def _post(self, path: str, body: bytes) -> tuple[int, Json]:
        if path == "/graphql":
            request = json.loads(body)
            return self._graphql(request["query"], request.get("variables") or {})
        if match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
            return 200, self._file_stream(self.runs[match[1]], json.loads(body))
        self.unknown.append(f"POST {path}")
        return 404, {}

    def _graphql(self, query: str, variables: Json) -> tuple[int, Json]:
        match = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = match[1] if match else query[:40]
        self.operations.append(name)
        snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
        answer: Callable[[Json], Any] | None = getattr(self, f"_on_{snake}", None)
        if answer is None:
            self.unknown.append(name)
            return 400, {"errors": [{"message": f"the stub has no {name}"}]}
        try:
            return 200, {"data": answer(variables)}
        except Exception as error:
            # Said by the test, and not retried by the client as a 500 would be.
            self.unknown.append(f"{name}: {error!r} for {variables}")
            return 400, {"errors": [{"message": repr(error)}]}

    def _on_viewer(self, variables: Json) -> Json:
        viewer = {"id": "u", "entity": ENTITY, "username": ENTITY, "email": None, "flags": "{}", "admin": False}
        return {"viewer": viewer | {"teams": {"edges": []}}}

    def _on_server_features_query(self, variables: Json) -> Json:
        return {"serverInfo": {"features": []}}

    def _on_upsert_bucket(self, variables: Json) -> Json:
        id = variables["name"]
        # The server's own limits.
        assert len(variables.get("displayName") or "") <= LONGEST_NAME
        assert all(1 <= len(tag) <= LONGEST_TAG for tag in variables.get("tags") or [])
        inserted = id not in self.runs
        run = self.runs.setdefault(id, Run(id, variables["project"], sweep=variables.get("sweep")))
        run.record |= {key: value for key, value in variables.items() if value is not None}
        if variables.get("config"):
            run.config |= json.loads(variables["config"])
        bucket = {
            "id": f"storage-{id}",
            "name": id,
            "displayName": run.record.get("displayName") or id,
            "description": None,
            "config": json.dumps(run.config),
            "sweepName": run.sweep,
            "project": {"id": "p", "name": run.project, "entity": {"id": "e", "name": ENTITY}},
            "historyLineCount": len(run.history),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _on_run_resume_status(self, variables: Json) -> Json:
        run = self.runs.get(variables["name"])
        bucket = None
        if run and run.project == variables["project"]:
            bucket = {
                "id": f"storage-{run.id}",
                "name": run.id,
                "summaryMetrics": json.dumps(run.summary),
                "displayName": run.record.get("displayName"),
                "logLineCount": len(run.output),
                "historyLineCount": len(run.history),
                "eventsLineCount": len(run.events),
                "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
                "eventsTail": json.dumps([json.dumps(row) for row in run.events[-1:]]),
                "config": json.dumps(run.config),
                "tags": run.record.get("tags") or [],
                "notes": None,
                "wandbConfig": json.dumps({"t": 1}),
            }
        return {
            "model": {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": ENTITY}, "bucket": bucket}
        }

    def _on_create_run_files(self, variables: Json) -> Json:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def _on_organization_core_weave_organization_id(self, variables: Json) -> Json:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def _on_artifact_type(self, variables: Json) -> Json:
        return {"project": {"artifact": None}}

    def _on_create_artifact(self, variables: Json) -> Json:
        asked = variables["input"]
        aliases = [alias["alias"] for alias in asked["aliases"]]
        id = f"artifact-{len(self.artifacts)}"
        for artifact in self.artifacts:
            artifact.aliases = [alias for alias in artifact.aliases if alias not in aliases]
        self.artifacts.append(
            Artifact(id, asked["artifactCollectionName"], asked["artifactTypeName"], aliases, asked["runName"])
        )
        artifact = {"id": id, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def _on_create_artifact_manifest(self, variables: Json) -> Json:
        file = {"id": "f", "uploadUrl": f"{self.url}/manifest/{variables['artifactID']}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": variables["artifactID"], "file": file}}}

    def _on_update_artifact_manifest(self, variables: Json) -> Json:
        file = {"id": "f", "uploadUrl": f"{self.url}/manifest/{variables['artifactManifestID']}", "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": variables["artifactManifestID"], "file": file}}}

    def _on_create_artifact_files(self, variables: Json) -> Json:
        edges = []
        for file in variables["input"]["artifactFiles"]:
            url = f"{self.url}/artifacts/{file['artifactID']}/{file['name']}"
            node = {"storagePath": None, "uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None}
            edges.append({"node": node | {"artifact": {"id": file["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _on_commit_artifact(self, variables: Json) -> Json:
        (artifact,) = (a for a in self.artifacts if a.id == variables["artifactID"])
        artifact.committed = True
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": ""}}}

    def _on_artifact_by_id(self, variables: Json) -> Json:
        (number, artifact) = next((i, a) for i, a in enumerate(self.artifacts) if a.id == variables["id"])
        project = {
            "id": "UA==",
            "internalId": "UA==",
            "name": self.runs[artifact.run].project,
            "entity": {"name": ENTITY},
        }
        sequence = {"__typename": "ArtifactSequence", "name": artifact.name, "project": project}
        answer = {
            **{"__typename": "Artifact", "id": artifact.id, "artifactSequence": sequence, "versionIndex": number},
            **{"artifactType": {"name": artifact.type}, "description": None, "metadata": "{}", "tags": []},
            **{"ttlDurationSeconds": 0, "ttlIsInherited": False, "historyStep": 0, "state": "COMMITTED", "digest": ""},
            **{"size": sum(map(len, artifact.files.values())), "fileCount": len(artifact.files), "commitHash": ""},
            **{"createdAt": "2026-01-01T00:00:00", "updatedAt": None, "aliases": []},
        }
        return {"artifact": answer}

    def _on_upsert_sweep(self, variables: Json) -> Json:
        config = yaml.safe_load(variables["config"])
        id, project = f"sweep{len(self.sweeps)}", variables["projectName"]
        self.sweeps[id] = Sweep(id, project, config, itertools.islice(draws(config), config.get("run_cap")))
        place = {"id": "p", "name": project, "entity": {"id": "e", "name": ENTITY}}
        return {"upsertSweep": {"sweep": {"name": id, "project": place}, "configValidationWarnings": []}}

    def _on_sweep_with_runs(self, variables: Json) -> Json:
        sweep = self.sweeps[variables["sweep"]]
        answer = {"id": sweep.id, "name": sweep.id, "config": yaml.safe_dump(sweep.config), "runs": {"edges": []}}
        return {"project": {"sweep": answer}}

    def _on_create_agent(self, variables: Json) -> Json:
        self.agents.append(variables["sweep"])
        return {"createAgent": {"agent": {"id": str(len(self.agents) - 1)}}}

    def _on_heartbeat(self, variables: Json) -> Json:
        agent, running = variables["id"], json.loads(variables["runState"])
        sweep = self.sweeps[self.agents[int(agent)]]
        ended = [id for id, owner in sweep.alive.items() if owner == agent and id not in running]
        commands = [{"type": "stop", "run_id": id} for id in running if self._falls_behind(sweep, id)]
        sweep.stopped |= {command["run_id"] for command in commands}
        for id in ended:
            del sweep.alive[id]
            if self.runs[id].exit_code is None:
                sweep.lost.append(id)
        if not running:
            commands.append(self._next_trial(sweep, agent))
        answer = {"agent": {"id": agent}, "commands": json.dumps(commands)}
        return {"agentHeartbeat": answer}

    def _next_trial(self, sweep: Sweep, agent: str) -> Json:
        """A trial whose process was killed is handed out again, with its whole config; else the next one drawn."""
        if sweep.lost:
            id, kind = sweep.lost.pop(), "resume"
        else:
            arguments = next(sweep.trials, None)
            if arguments is None:
                return {"type": "exit"}
            id, kind = f"trial{len(self.runs)}", "run"
            config = {name: {"value": value} for name, value in arguments.items()}
            self.runs[id] = Run(id, sweep.project, sweep.id, config)
        sweep.alive[id] = agent
        self.handed_out.append((kind, id))
        return {"type": kind, "run_id": id, "args": self.runs[id].config, "program": None}

    def _falls_behind(self, sweep: Sweep, id: str) -> bool:
        """Hyperband's first look: whether the run's metric is not among the best 1/eta of those that came so far."""
        rule = sweep.config.get("early_terminate")
        if rule is None:
            return False
        metric, at = sweep.config["metric"]["name"], rule["min_iter"]
        values = {run.id: [row[metric] for row in run.history if metric in row] for run in self.runs.values()}
        reached = sorted(found[at - 1] for found in values.values() if len(found) >= at)
        return len(values[id]) >= at and values[id][at - 1] > reached[(len(reached) - 1) // rule["eta"]]

    def _file_stream(self, run: Run, sent: Json) -> Json:
        for name, chunk in (sent.get("files") or {}).items():
            rows = [self._decode(text) for text in chunk["content"]]
            if name == "wandb-summary.json":
                run.summary = rows[-1]
            else:
                kept = getattr(run, FILES[name])
                kept[chunk["offset"] : chunk["offset"] + len(rows)] = rows
        run.preempting = run.preempting or bool(sent.get("preempting"))
        if sent.get("complete"):
            run.exit_code = sent["exitcode"]
            run.state = "finished" if run.exit_code == 0 else "preempted" if run.preempting else "failed"
        return {"stopped": run.sweep in self.sweeps and run.id in self.sweeps[run.sweep].stopped}

    @staticmethod
    def _decode(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            return text

    def _store(self, path: str, body: bytes) -> None:
        """Keep a file of an artifact; those of runs are the client's own records."""
        if match := re.fullmatch(r"/artifacts/([^/]+)/(.+)", path):
            (artifact,) = (a for a in self.artifacts if a.id == match[1])
            artifact.files[match[2]] = body
