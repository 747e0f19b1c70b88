"""What the provider's REST API v2 sends and takes, as typed dataclasses.

Field names are v2's in snake case (`dataCenterId` -> data_center_id), units in the docstrings. A response may
carry more than is read here; a request is closed, as it is on the service, which answers 422 to an unknown key.
Values that could hold a secret (env) are left out of repr, so that no exception or log shows them.
"""

from __future__ import annotations

from dataclasses import field
from datetime import datetime
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter
from pydantic.alias_generators import to_camel
from pydantic.dataclasses import dataclass

RESPONSE = ConfigDict(
    alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, extra="ignore", hide_input_in_errors=True
)
REQUEST = ConfigDict(alias_generator=to_camel, validate_by_name=True, extra="forbid", hide_input_in_errors=True)

T = TypeVar("T")


def parse(kind: type[T], value: Any) -> T:
    """Raises pydantic.ValidationError (without the values) where `value` is not a `kind`."""
    return TypeAdapter(kind).validate_python(value)


def body(request: Any) -> dict[str, Any]:
    """The JSON body of a request: v2's names, fields that are None left to the service's default."""
    return TypeAdapter(type(request)).dump_python(request, mode="json", by_alias=True, exclude_none=True)


# ------------------------------------------------------------------ parts


@dataclass(frozen=True, config=REQUEST)
class NetworkMount:
    volume_id: str
    path: str


@dataclass(frozen=True, config=REQUEST)
class Mounts:
    network: list[NetworkMount] | None = None


@dataclass(frozen=True, config=REQUEST)
class PodGpu:
    id: str
    count: int = 1
    min_cuda_version: str | None = None


@dataclass(frozen=True, config=REQUEST)
class EndpointGpu:
    pools: list[str]
    count: int = 1
    excluded_types: list[str] | None = None
    min_cuda_version: str | None = None


@dataclass(frozen=True, config=REQUEST)
class ClusterCompute:
    gpu_type_id: str
    gpu_count_per_pod: int
    pod_count: int


@dataclass(frozen=True, config=REQUEST)
class QueueDelay:
    queue_delay: float
    """Seconds that a request may wait before another worker is started."""
    type: Literal["QUEUE_DELAY"] = "QUEUE_DELAY"


@dataclass(frozen=True, config=REQUEST)
class RequestCount:
    request_count: int
    """Requests that one worker is meant to hold."""
    type: Literal["REQUEST_COUNT"] = "REQUEST_COUNT"


@dataclass(frozen=True, config=REQUEST)
class Workers:
    min: int | None = None
    max: int | None = None
    idle_timeout: int | None = None
    """Seconds; refused by the service for QUEUE endpoints with REQUEST_COUNT scaling."""


# -------------------------------------------------------------- responses


@dataclass(frozen=True, config=RESPONSE)
class GpuCount:
    id: str
    count: int = 1


@dataclass(frozen=True, config=RESPONSE)
class ClusterMembership:
    id: str
    """Of the cluster."""
    rank: int | None
    """NODE_RANK; None until it is assigned."""


@dataclass(frozen=True, config=RESPONSE)
class Pod:
    id: str
    name: str
    status: str
    """PROVISIONING, STARTING, RUNNING; EXITED, ERROR, TERMINATED; or one that is new there."""
    cost: float
    """US dollars an hour at present; 0 when EXITED or TERMINATED, though its disk goes on costing."""
    created_at: datetime
    gpu: GpuCount | None = None
    env: dict[str, str] = field(default_factory=dict, repr=False)
    cluster: ClusterMembership | None = None
    """Of a Pod that belongs to an Instant Cluster: it is deleted with that, and not by itself."""


@dataclass(frozen=True, config=RESPONSE)
class Cluster:
    id: str
    name: str
    compute: ClusterCompute
    created_at: datetime


@dataclass(frozen=True, config=RESPONSE)
class NetworkVolume:
    id: str
    name: str
    size: int
    """GB."""
    data_center: str


@dataclass(frozen=True, config=RESPONSE)
class Endpoint:
    id: str
    name: str
    workers: Workers
    scaling: QueueDelay | RequestCount
    network_volumes: list[str]
    data_center_ids: list[str]
    timeout: int
    """Milliseconds that one request may take."""
    flashboot: str
    created_at: datetime
    image: str | None = None
    disk: int | None = None
    gpu: dict[str, Any] | None = None
    request_urls: dict[str, str] = field(default_factory=dict)
    """QUEUE: run, runSync, status, stream, cancel, retry, purgeQueue, health. LOAD_BALANCER: base, health."""
    env: dict[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, config=RESPONSE)
class EndpointBill:
    """US dollars for one bucket of time."""

    start_time: datetime
    end_time: datetime
    gpu_amount: float


@dataclass(frozen=True, config=RESPONSE)
class Worker:
    id: str
    is_stale: bool


@dataclass(frozen=True, config=RESPONSE)
class GpuPrice:
    """US dollars an hour for one GPU."""

    secure: float
    community: float
    serverless: float | None = None


@dataclass(frozen=True, config=RESPONSE)
class MaxCount:
    secure: int
    community: int


@dataclass(frozen=True, config=RESPONSE)
class DataCenterStock:
    id: str
    availability: str
    """NONE, LOW, MEDIUM, HIGH."""


@dataclass(frozen=True, config=RESPONSE)
class GpuType:
    id: str
    name: str
    pool: str | None
    price: GpuPrice
    max_count: MaxCount
    secure: bool
    availability: str | None = None
    """Only when asked for."""
    data_centers: list[DataCenterStock] = field(default_factory=list)


# --------------------------------------------------------------- requests


@dataclass(frozen=True, config=REQUEST)
class CreatePod:
    name: str
    image: str
    gpu: PodGpu
    args: str | None = None
    """One string, split as a shell would; v1 had a list."""
    disk: int | None = None
    """GB of container disk."""
    env: dict[str, str] | None = field(default=None, repr=False)
    cloud: Literal["SECURE", "COMMUNITY"] | None = None
    data_center_ids: list[str] | None = None
    mounts: Mounts | None = None
    global_networking: bool | None = None
    """A private address that the account's other Pods reach, at 100 Mbit/s."""


@dataclass(frozen=True, config=REQUEST)
class CreateCluster:
    name: str
    compute: ClusterCompute
    image: str
    type: Literal["TRAINING", "SLURM", "RAY", "APPLICATION"] = "TRAINING"
    args: str | None = None
    disk: int | None = None
    env: dict[str, str] | None = field(default=None, repr=False)
    mounts: Mounts | None = None
    data_center_ids: list[str] | None = None


@dataclass(frozen=True, config=REQUEST)
class CreateNetworkVolume:
    name: str
    size: int
    """GB, 10 to 4096."""
    data_center: str


@dataclass(frozen=True, config=REQUEST)
class CreateEndpoint:
    name: str
    scaling: QueueDelay | RequestCount
    type: Literal["QUEUE", "LOAD_BALANCER"] = "QUEUE"
    gpu: EndpointGpu | None = None
    image: str | None = None
    disk: int | None = None
    env: dict[str, str] | None = field(default=None, repr=False)
    workers: Workers | None = None
    flashboot: Literal["OFF", "FLASHBOOT", "PRIORITY_FLASHBOOT"] | None = None
    """The service's default here is OFF, not the console's FLASHBOOT."""
    network_volumes: list[str] | None = None
    data_center_ids: list[str] | None = None
    timeout: int | None = None
    """Milliseconds; the service's default is 300000."""


@dataclass(frozen=True, config=REQUEST)
class UpdateEndpoint:
    """Fields that are None stay as they are; env, where given, replaces the whole."""

    scaling: QueueDelay | RequestCount | None = None
    gpu: EndpointGpu | None = None
    image: str | None = None
    disk: int | None = None
    env: dict[str, str] | None = field(default=None, repr=False)
    workers: Workers | None = None
    flashboot: Literal["OFF", "FLASHBOOT", "PRIORITY_FLASHBOOT"] | None = None
    network_volumes: list[str] | None = None
    data_center_ids: list[str] | None = None
    timeout: int | None = None
