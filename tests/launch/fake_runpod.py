"""A local stand-in for Runpod's REST API v2, over real HTTP on loopback.

Every request and every answer is validated against the provider's OpenAPI description (openapi.py); a request
with an unknown key gets 422, an answer that does not match is a defect of this file and is kept in `violations`.
Rules that the description states in words (one of gpu and cpu; a Pod where its volume is; ...) answer 400.

    with FakeRunpod() as fake:            fake.url, fake.key for the client
        fake.fault(3, "lost")             the third call is carried out, and its answer never arrives
        fake.runner = ProcessRunner(tmp)  Pods run their args as a real process (pod_process.py)

Faults: timeout and 500 do nothing and fail; 429 does nothing; malformed and lost do it, then spoil the answer.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.launch import openapi

FAULTS = ("timeout", "429", "500", "malformed", "lost")
HANG_S = 10.0
"""A call that is not answered: longer than any test waits, so that how busy the machine is decides nothing."""
DATA_CENTERS = ("EU-RO-1", "US-TX-3")
GPUS = {  # id: (name, pool, GB, secure, community, serverless)
    "NVIDIA A100-SXM4-80GB": ("A100 SXM", "AMPERE_80", 80, 1.79, 1.39, 2.74),
    "NVIDIA H100 80GB HBM3": ("H100 SXM", "ADA_80_PRO", 80, 3.99, 2.69, 4.18),
    "NVIDIA H100 PCIe": ("H100 PCIe", "ADA_80_PRO", 80, 2.89, 1.99, 4.18),
    "NVIDIA H200": ("H200 SXM", "HOPPER_141", 141, 4.59, 3.59, 5.58),
    "NVIDIA B200": ("B200", "BLACKWELL_180", 180, 6.79, 5.98, 8.64),
    "NVIDIA L40S": ("L40S", "ADA_48_PRO", 48, 0.99, 0.79, 1.91),
    "NVIDIA L40": ("L40", "ADA_48_PRO", 48, 0.89, 0.69, 1.91),
    "NVIDIA GeForce RTX 4090": ("RTX 4090", "ADA_24", 24, 0.69, 0.34, 1.12),
}


class Problem(Exception):
    def __init__(self, status: int, detail: str, errors: list[str] | None = None):
        super().__init__(detail)
        self.status, self.detail, self.errors = status, detail, errors or []


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class FakeRunpod:
    """State of one account, and the server in front of it."""

    def __init__(self, key: str = "rpa_FAKE0KEY0THAT0NO0LOG0MAY0SHOW"):
        self.key = key
        self.pods: dict[str, dict[str, Any]] = {}
        self.clusters: dict[str, dict[str, Any]] = {}
        self.volumes: dict[str, dict[str, Any]] = {}
        self.endpoints: dict[str, dict[str, Any]] = {}
        self.workers: dict[str, list[dict[str, Any]]] = {}
        self.logs: dict[str, list[str]] = {}
        self.hourly_usd: dict[str, list[float]] = {}
        self.created: list[tuple[str, str]] = []
        self.deleted: list[tuple[str, str]] = []
        self.calls: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.violations: list[str] = []
        self.faults: dict[int, str] = {}
        self.named_faults: dict[tuple[str, int], str] = {}
        """(operation, its how many-th call from 1) -> kind; for calls whose order is not fixed."""
        self.named_calls: list[str] = []
        self.sold_out: set[str] = set()
        self.drop_log_after: int | None = None
        """Close every log stream after so many lines."""
        self.runner: Callable[[FakeRunpod, str], None] | None = None
        """Called in a thread of its own with the id of each new Pod."""
        self.lock = threading.RLock()
        self.news = threading.Condition(self.lock)
        self._numbers = 0
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> FakeRunpod:
        fake = self

        class Handler(_Handler):
            account = fake

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._server is not None
        with self.news:
            for id in list(self.pods):
                self.end_pod(id)
            self._server.stopping = True  # type: ignore[attr-defined]
            self.news.notify_all()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.server_port}/v2"

    def fault(self, call: int, kind: str) -> None:
        """Spoil the call of that number, counted from 1 (calls that Pods make themselves are not counted)."""
        self.faults[call] = kind

    def pod_key(self, id: str) -> str:
        return f"podkey_{id}"

    def say(self, pod: str, line: str) -> None:
        with self.news:
            self.logs.setdefault(pod, []).append(json.dumps({"ts": now(), "source": "container", "line": line}))
            self.news.notify_all()

    def end_pod(self, id: str) -> None:
        with self.news:
            pod = self.pods.pop(id, None)
            if pod is not None and (end := pod["_end"]):
                end()
            self.news.notify_all()

    def number(self, prefix: str) -> str:
        self._numbers += 1
        return f"{prefix}{self._numbers:04d}"

    # ----------------------------------------------------------- operations

    def listPods(self, ids, query, body):
        members = query.get("includeClusterPods") == "true"
        return 200, {"pods": [_public(p) for p in self.pods.values() if members or "cluster" not in p]}

    def getPod(self, ids, query, body):
        return 200, _public(self._of(self.pods, ids["id"]))

    def createPod(self, ids, query, body):
        if ("gpu" in body) == ("cpu" in body):
            raise Problem(400, "exactly one of gpu and cpu is needed")
        gpu = body.get("gpu", {})
        if gpu and gpu["id"] not in GPUS:
            raise Problem(400, f"unknown GPU type {gpu['id']}")
        if gpu and (gpu["id"] in self.sold_out or gpu.get("count", 1) > 8):
            raise Problem(400, "there are no instances of that kind available at present")
        place = (body.get("dataCenterIds") or [DATA_CENTERS[0]])[0]
        for mount in body.get("mounts", {}).get("network", []):
            volume = self._of(self.volumes, mount["volumeId"])
            if body.get("dataCenterIds") and volume["dataCenter"] not in body["dataCenterIds"]:
                raise Problem(400, "the network volume is in another data center")
            place = volume["dataCenter"]
        id = self.number("pod")
        self.pods[id] = self._pod(id, body, gpu, place)
        self.created.append(("pod", body["name"]))
        if self.runner:
            threading.Thread(target=self.runner, args=(self, id), daemon=True).start()
        return 201, _public(self.pods[id])

    def _pod(self, id: str, body: dict, gpu: dict, place: str) -> dict[str, Any]:
        count = gpu.get("count", 1)
        column = 4 if body.get("cloud") == "COMMUNITY" else 3
        return {
            "id": id,
            "name": body["name"],
            "status": "RUNNING",
            "actions": ["stop", "restart", "terminate"],
            "image": body.get("image", "none"),
            "args": body.get("args", ""),
            "disk": body.get("disk", 50),
            "mounts": body.get("mounts", {}),
            "ports": body.get("ports", []),
            "env": body.get("env", {}),
            "registry": None,
            **({"gpu": {"id": gpu["id"], "count": count}} if gpu else {}),
            "cloud": body.get("cloud", "SECURE"),
            "dataCenterId": place,
            "cudaVersion": "13.0",
            "ssh": {"proxy": None, "direct": None},
            "template": None,
            "cost": round(GPUS[gpu["id"]][column] * count, 4) if gpu else 0.1,
            "locked": False,
            "runtime": None,
            "createdAt": now(),
            "startedAt": now(),
            "globalNetworking": {"enabled": body.get("globalNetworking", False)},
            "_end": None,
        }

    def deletePod(self, ids, query, body):
        if "cluster" in self._of(self.pods, ids["id"]):
            raise Problem(409, "the Pod belongs to a cluster; delete that")
        self.deleted.append(("pod", ids["id"]))
        self.end_pod(ids["id"])
        return 204, None

    def listClusters(self, ids, query, body):
        return 200, {"clusters": [self._cluster(id) for id in self.clusters]}

    def getCluster(self, ids, query, body):
        self._of(self.clusters, ids["id"])
        return 200, self._cluster(ids["id"])

    def _cluster(self, id: str) -> dict[str, Any]:
        statuses = [self.pods[pod]["status"] for pod in self.clusters[id]["_pods"] if pod in self.pods]
        summary = {"total": len(statuses), "byStatus": {status: statuses.count(status) for status in set(statuses)}}
        return {**_public(self.clusters[id]), "pods": summary}

    def listClusterPods(self, ids, query, body):
        members = self._of(self.clusters, ids["id"])["_pods"]
        return 200, {"pods": [_public(self.pods[id]) for id in members if id in self.pods]}

    def createCluster(self, ids, query, body):
        compute = body["compute"]
        if compute["gpuTypeId"] not in GPUS:
            raise Problem(400, f"unknown GPU type {compute['gpuTypeId']}")
        if compute["gpuTypeId"] in self.sold_out:
            raise Problem(400, "there is no capacity for this cluster at present")
        if compute["gpuCountPerPod"] > 8:
            raise Problem(400, "no machine has so many of this GPU")
        place = (body.get("dataCenterIds") or [DATA_CENTERS[0]])[0]
        for mount in body.get("mounts", {}).get("network", []):
            place = self._of(self.volumes, mount["volumeId"])["dataCenter"]
            if body.get("dataCenterIds") and place not in body["dataCenterIds"]:
                raise Problem(400, "the network volume is in another data center")
        id = self.number("cluster")
        members = []
        port = str(free_port())
        for rank in range(compute["podCount"]):
            pod = self.number("pod")
            gpu = {"id": compute["gpuTypeId"], "count": compute["gpuCountPerPod"]}
            self.pods[pod] = self._pod(pod, {**body, "name": f"{body['name']}-{rank}"}, gpu, place)
            self.pods[pod]["cluster"] = {"id": id, "rank": rank}
            self.pods[pod]["_own"] = self._cluster_env(compute, rank, port)
            members.append(pod)
        self.clusters[id] = {
            "id": id,
            "name": body["name"],
            "type": body["type"],
            "compute": compute,
            "dataCenterId": place,
            "createdAt": now(),
            "_pods": members,
        }
        self.created.append(("cluster", body["name"]))
        for pod in members if self.runner else ():
            threading.Thread(target=self.runner, args=(self, pod), daemon=True).start()
        return 201, self._cluster(id)

    def _cluster_env(self, compute: dict[str, Any], rank: int, port: str) -> dict[str, str]:
        """What the service sets in each node. Here all nodes are on loopback, which is their ens1."""
        nodes, gpus = compute["podCount"], compute["gpuCountPerPod"]
        shape = {"NUM_NODES": nodes, "NUM_TRAINERS": gpus, "NODE_RANK": rank, "WORLD_SIZE": nodes * gpus}
        places = {f"{name}_ADDR": "127.0.0.1" for name in ("PRIMARY", "MASTER", "NODE")}
        ports = {"PRIMARY_PORT": port, "MASTER_PORT": port, "HOST_NODE_ADDR": f"127.0.0.1:{port}"}
        return {**{name: str(value) for name, value in shape.items()}, **places, **ports}

    def deleteCluster(self, ids, query, body):
        for pod in self._of(self.clusters, ids["id"])["_pods"]:
            self.end_pod(pod)
        del self.clusters[ids["id"]]
        self.deleted.append(("cluster", ids["id"]))
        return 204, None

    def listNetworkVolumes(self, ids, query, body):
        return 200, {"networkVolumes": list(self.volumes.values())}

    def getNetworkVolume(self, ids, query, body):
        return 200, self._of(self.volumes, ids["id"])

    def createNetworkVolume(self, ids, query, body):
        if body["dataCenter"] not in DATA_CENTERS:
            raise Problem(400, f"no such data center: {body['dataCenter']}")
        id = self.number("vol")
        self.volumes[id] = {"id": id, "type": "STANDARD", **body}
        self.created.append(("volume", body["name"]))
        return 201, self.volumes[id]

    def deleteNetworkVolume(self, ids, query, body):
        del self.volumes[self._of(self.volumes, ids["id"])["id"]]
        self.deleted.append(("volume", ids["id"]))
        return 204, None

    def listEndpoints(self, ids, query, body):
        return 200, {"endpoints": list(self.endpoints.values())}

    def createEndpoint(self, ids, query, body):
        if ("gpu" in body) == ("cpu" in body):
            raise Problem(400, "exactly one of gpu and cpu is needed")
        by_count = body["type"] == "QUEUE" and body["scaling"]["type"] == "REQUEST_COUNT"
        if by_count and "idleTimeout" in body.get("workers", {}):
            raise Problem(400, "idleTimeout does not go with REQUEST_COUNT scaling of a QUEUE endpoint")
        self._known_pools(body.get("gpu", {}))
        for volume in body.get("networkVolumes", []):
            self._of(self.volumes, volume)
        id = self.number("ep")
        self.endpoints[id] = self._endpoint(id, body)
        self.created.append(("endpoint", body["name"]))
        self.workers[id] = []
        return 201, self.endpoints[id]

    def _known_pools(self, gpu: dict[str, Any]) -> None:
        pools = {facts[1] for facts in GPUS.values()}
        for pool in gpu.get("pools", []):
            if pool not in pools:
                raise Problem(400, f"unknown GPU pool {pool}")
        for excluded in gpu.get("excludedTypes", []):
            if excluded not in GPUS or GPUS[excluded][1] not in gpu["pools"]:
                raise Problem(400, f"{excluded} is in none of the pools")

    def _endpoint(self, id: str, body: dict[str, Any]) -> dict[str, Any]:
        gpu = body.get("gpu")
        base = f"{self.url.removesuffix('/v2')}/queue/{id}"
        paths = {"run": "run", "runSync": "runsync", "status": "status", "stream": "stream", "cancel": "cancel"}
        paths |= {"retry": "retry", "purgeQueue": "purge-queue", "health": "health"}
        return {
            "id": id,
            "name": body["name"] + ("" if body.get("flashboot", "OFF") == "OFF" else " -fb"),
            "type": body["type"],
            "requestUrls": {name: f"{base}/{path}" for name, path in paths.items()}
            if body["type"] == "QUEUE"
            else {"base": base, "health": f"{base}/ping"},
            "image": body.get("image", ""),
            "args": body.get("args", ""),
            "disk": body.get("disk", 20),
            "env": body.get("env", {}),
            "ports": body.get("ports", []),
            "registry": None,
            "gpu": gpu and {"count": 1, "allowedCudaVersions": [], "minCudaVersion": None, **gpu},
            "workers": {"min": 0, "max": 3, **body.get("workers", {})},
            "scaling": body["scaling"],
            "dataCenterIds": body.get("dataCenterIds", []),
            "networkVolumes": body.get("networkVolumes", []),
            "timeout": body.get("timeout", 300000),
            "flashboot": body.get("flashboot", "OFF"),
            "createdAt": now(),
        }

    def updateEndpoint(self, ids, query, body):
        endpoint = self._of(self.endpoints, ids["id"])
        self._known_pools(body.get("gpu", {}))
        for key, value in body.items():
            if key in ("gpu", "workers"):
                endpoint[key] = {**(endpoint[key] or {}), **value}
            else:
                endpoint[key] = value
        return 200, endpoint

    def deleteEndpoint(self, ids, query, body):
        del self.endpoints[self._of(self.endpoints, ids["id"])["id"]]
        self.deleted.append(("endpoint", ids["id"]))
        return 204, None

    def listEndpointWorkers(self, ids, query, body):
        self._of(self.endpoints, ids["id"])
        workers = self.workers[ids["id"]]
        names = ("running", "idle", "initializing", "throttled", "unhealthy")
        summary = {name: sum(w["status"] == name.upper() for w in workers) for name in names}
        return 200, {"workers": workers, "summary": {**summary, "total": len(workers)}}

    def listServerlessBilling(self, ids, query, body):
        """self.hourly_usd[endpoint]: dollars of each hour up to this one, newest last."""
        id, hours = query["serverlessId"], int(query["lastN"])
        end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
        amounts = self.hourly_usd.get(id, [])[-hours:]
        stamp = lambda back: (end - timedelta(hours=back)).strftime("%Y-%m-%dT%H:%M:%SZ")  # noqa: E731
        records, zero = [], {"cpuAmount": 0.0, "diskAmount": 0.0, "feeAmount": 0.0}
        for back, usd in zip(range(len(amounts), 0, -1), amounts, strict=True):
            if usd:
                span = {"startTime": stamp(back), "endTime": stamp(back - 1)}
                records.append({**span, "serverlessId": id, "gpuAmount": usd, "totalAmount": usd, **zero})
        total = sum(amounts)
        asked = {"startTime": stamp(hours), "endTime": stamp(0), "bucketSize": "hour", "serverlessId": id}
        totals = {"gpuAmount": total, "totalAmount": total, **zero}
        counts = {"recordCount": len(records), "uniqueServerlessCount": 1}
        return 200, {"records": records, "metadata": {"query": asked, "totals": totals, **counts}}

    def listGpuTypes(self, ids, query, body):
        if query.get("include") and "product" not in query:
            raise Problem(400, "include=AVAILABILITY needs product")
        return 200, {"gpus": [self._gpu(id, "include" in query) for id in GPUS]}

    def _gpu(self, id: str, stock: bool) -> dict[str, Any]:
        name, pool, memory, secure, community, serverless = GPUS[id]
        level = "NONE" if id in self.sold_out else "HIGH"
        places = [{"id": place, "name": place, "availability": level} for place in DATA_CENTERS]
        return {
            "id": id,
            "name": name,
            "pool": pool,
            "manufacturer": "NVIDIA",
            "memory": memory,
            "secure": True,
            "community": True,
            "price": {"secure": secure, "community": community, "serverless": serverless},
            "maxCount": {"secure": 8, "community": 8},
            **({"availability": level} if stock else {}),
            **({"dataCenters": places} if stock and level != "NONE" else {}),
        }

    @staticmethod
    def _of(things: dict[str, dict[str, Any]], id: str) -> dict[str, Any]:
        if id not in things:
            raise Problem(404, "there is no such thing")
        return things[id]


def _public(thing: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in thing.items() if not key.startswith("_")}


class _Handler(BaseHTTPRequestHandler):
    account: FakeRunpod
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_POST = do_PATCH = do_DELETE = do_GET

    def answer(self) -> None:
        fake = self.account
        self.close_connection = True
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length)
        url = urlsplit(self.path)
        by_pod = self.headers.get("Authorization", "").startswith("Bearer podkey_")
        fault = None
        if not by_pod:
            with fake.lock:
                fake.calls.append(f"{self.command} {url.path}")
                fault = fake.faults.get(len(fake.calls))
                if known := openapi.find(self.command, url.path):
                    fake.named_calls.append(known[0].name)
                    number = fake.named_calls.count(known[0].name)
                    fault = fake.named_faults.get((known[0].name, number), fault)
        if fault == "timeout":
            time.sleep(HANG_S)
            return
        if fault == "429":
            self.send(429, {"title": "Too Many Requests", "status": 429, "detail": "slow down"}, {"Retry-After": "0"})
            return
        if fault == "500":
            self.send(500, {"title": "Internal Server Error", "status": 500, "detail": "it broke"})
            return
        found = openapi.find(self.command, url.path)
        query = dict(parse_qsl(url.query))
        try:
            if found is None:
                raise Problem(404, f"no operation {self.command} {url.path}")
            operation, ids = found
            ids = {name: unquote(value) for name, value in ids.items()}
            self.authorise(operation.name, ids)
            body = self.validated(operation, query, raw)
            if operation.name == "getPodLogs":
                if fault == "malformed":
                    self.send_raw(200, b"{", "text/event-stream")
                elif fault != "lost":
                    self.stream(ids["id"], query)
                return
            with fake.lock:
                status, value = getattr(fake, operation.name)(ids, query, body)
                text = None if value is None else json.dumps(value)
        except Problem as problem:
            value = {"title": "Problem", "status": problem.status, "detail": problem.detail}
            value |= {"errors": problem.errors} if problem.errors else {}
            if found is not None:
                fake.violations += openapi.response_errors(found[0], problem.status, value)
            self.send(problem.status, value)
            return
        wrong = openapi.response_errors(operation, status, None if text is None else json.loads(text))
        if wrong:
            fake.violations += wrong
        if fault == "lost":
            return
        self.send_raw(status, b'{"id": "cut' if fault == "malformed" else (text or "").encode(), "application/json")

    def authorise(self, operation: str, ids: dict[str, str]) -> None:
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if key == self.account.key:
            return
        if operation in ("getPod", "deletePod") and key == self.account.pod_key(ids["id"]):
            return
        members = self.account.clusters.get(ids.get("id", ""), {}).get("_pods", [])
        if operation == "deleteCluster" and key in map(self.account.pod_key, members):
            return
        raise Problem(401, "the key is not valid")

    def validated(self, operation: openapi.Operation, query: dict[str, str], raw: bytes) -> Any:
        wrong = openapi.query_errors(operation, query)
        body = None
        if operation.request is not None:
            body = json.loads(raw)
            wrong += openapi.errors(operation.request, body)
            self.account.bodies.append(body)
        elif raw:
            wrong.append("$: this operation takes no body")
        if wrong:
            raise Problem(422, "the request does not match the contract", wrong)
        return body

    def stream(self, id: str, query: dict[str, str]) -> None:
        fake = self.account
        if id not in fake.pods and id not in fake.logs:
            raise Problem(404, "there is no such Pod")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        sent, given = 0, 0
        while True:
            with fake.news:
                lines = fake.logs.get(id, [])
                if sent >= len(lines):
                    if id not in fake.pods:
                        return
                    fake.news.wait(0.5)
                    if id not in fake.pods or getattr(self.server, "stopping", False):
                        return
                lines = lines[sent:]
            for line in lines:
                sent += 1
                ts = json.loads(line)["ts"]
                if ts < query.get("since", ""):
                    continue
                try:
                    self.wfile.write(f"id: {ts}/{sent:012d}\ndata: {line}\n\n".encode())
                    self.wfile.flush()
                except OSError:
                    return
                given += 1
                if fake.drop_log_after is not None and given >= fake.drop_log_after:
                    return

    def send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self.send_raw(status, json.dumps(value).encode(), "application/problem+json", headers)

    def send_raw(self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        try:
            self.send_response(status)
            if data:
                self.send_header("Content-Type", kind)
            for name, value in {**(headers or {}), "Connection": "close"}.items():
                self.send_header(name, value)
            if status != 204:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # the client has given up
