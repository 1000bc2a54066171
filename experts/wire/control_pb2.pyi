from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MemberKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MEMBER_KIND_UNSPECIFIED: _ClassVar[MemberKind]
    MEMBER_KIND_ROUTER: _ClassVar[MemberKind]
    MEMBER_KIND_INGRESS: _ClassVar[MemberKind]
MEMBER_KIND_UNSPECIFIED: MemberKind
MEMBER_KIND_ROUTER: MemberKind
MEMBER_KIND_INGRESS: MemberKind

class LayerExperts(_message.Message):
    __slots__ = ("layer", "experts")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ...) -> None: ...

class ComputeCost(_message.Message):
    __slots__ = ("per_expert_s", "per_row_s")
    PER_EXPERT_S_FIELD_NUMBER: _ClassVar[int]
    PER_ROW_S_FIELD_NUMBER: _ClassVar[int]
    per_expert_s: float
    per_row_s: float
    def __init__(self, per_expert_s: _Optional[float] = ..., per_row_s: _Optional[float] = ...) -> None: ...

class HostReport(_message.Message):
    __slots__ = ("name", "incarnation", "address", "node", "pid", "metrics_address", "transport", "held", "rows_total", "held_bytes", "problem", "cost", "failed", "order", "rows", "num_shipments", "compute_s", "num_damaged")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    ROWS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_SHIPMENTS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    NUM_DAMAGED_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: int
    address: str
    node: str
    pid: int
    metrics_address: str
    transport: str
    held: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    rows_total: int
    held_bytes: int
    problem: str
    cost: ComputeCost
    failed: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    order: int
    rows: _containers.RepeatedCompositeFieldContainer[LayerRows]
    num_shipments: int
    compute_s: float
    num_damaged: int
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[int] = ..., address: _Optional[str] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., metrics_address: _Optional[str] = ..., transport: _Optional[str] = ..., held: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ..., rows_total: _Optional[int] = ..., held_bytes: _Optional[int] = ..., problem: _Optional[str] = ..., cost: _Optional[_Union[ComputeCost, _Mapping]] = ..., failed: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ..., order: _Optional[int] = ..., rows: _Optional[_Iterable[_Union[LayerRows, _Mapping]]] = ..., num_shipments: _Optional[int] = ..., compute_s: _Optional[float] = ..., num_damaged: _Optional[int] = ...) -> None: ...

class LayerRows(_message.Message):
    __slots__ = ("layer", "experts", "rows")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    rows: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ..., rows: _Optional[_Iterable[int]] = ...) -> None: ...

class HostOrder(_message.Message):
    __slots__ = ("target", "retire", "cut_ms", "peers", "bytes_per_s", "number")
    class Target(_message.Message):
        __slots__ = ("experts",)
        EXPERTS_FIELD_NUMBER: _ClassVar[int]
        experts: _containers.RepeatedCompositeFieldContainer[LayerExperts]
        def __init__(self, experts: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ...) -> None: ...
    TARGET_FIELD_NUMBER: _ClassVar[int]
    RETIRE_FIELD_NUMBER: _ClassVar[int]
    CUT_MS_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    target: HostOrder.Target
    retire: bool
    cut_ms: int
    peers: _containers.RepeatedCompositeFieldContainer[Peer]
    bytes_per_s: float
    number: int
    def __init__(self, target: _Optional[_Union[HostOrder.Target, _Mapping]] = ..., retire: _Optional[bool] = ..., cut_ms: _Optional[int] = ..., peers: _Optional[_Iterable[_Union[Peer, _Mapping]]] = ..., bytes_per_s: _Optional[float] = ..., number: _Optional[int] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("name", "address", "experts")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    experts: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ..., experts: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ...) -> None: ...

class MemberReport(_message.Message):
    __slots__ = ("kind", "name", "address", "node", "pid", "state", "running", "waiting", "metrics_address", "http", "view_version", "view_epoch", "inner_host", "problem", "max_model_len", "kv_tokens", "hosts", "longest_wait_s")
    class HostsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HTTP_FIELD_NUMBER: _ClassVar[int]
    VIEW_VERSION_FIELD_NUMBER: _ClassVar[int]
    VIEW_EPOCH_FIELD_NUMBER: _ClassVar[int]
    INNER_HOST_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    LONGEST_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    kind: MemberKind
    name: str
    address: str
    node: str
    pid: int
    state: str
    running: int
    waiting: int
    metrics_address: str
    http: str
    view_version: int
    view_epoch: int
    inner_host: HostReport
    problem: str
    max_model_len: int
    kv_tokens: int
    hosts: _containers.ScalarMap[str, str]
    longest_wait_s: float
    def __init__(self, kind: _Optional[_Union[MemberKind, str]] = ..., name: _Optional[str] = ..., address: _Optional[str] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., state: _Optional[str] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., metrics_address: _Optional[str] = ..., http: _Optional[str] = ..., view_version: _Optional[int] = ..., view_epoch: _Optional[int] = ..., inner_host: _Optional[_Union[HostReport, _Mapping]] = ..., problem: _Optional[str] = ..., max_model_len: _Optional[int] = ..., kv_tokens: _Optional[int] = ..., hosts: _Optional[_Mapping[str, str]] = ..., longest_wait_s: _Optional[float] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("layer", "expert", "hosts")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    hosts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., hosts: _Optional[_Iterable[int]] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("epoch", "host_names", "replicas")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HOST_NAMES_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    host_names: _containers.RepeatedScalarFieldContainer[str]
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    def __init__(self, epoch: _Optional[int] = ..., host_names: _Optional[_Iterable[str]] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ...) -> None: ...

class Host(_message.Message):
    __slots__ = ("name", "incarnation", "address", "node", "pid", "state", "transport", "slots", "slots_target", "rows_total", "metrics_address", "cost")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_TARGET_FIELD_NUMBER: _ClassVar[int]
    ROWS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: int
    address: str
    node: str
    pid: int
    state: str
    transport: str
    slots: int
    slots_target: int
    rows_total: int
    metrics_address: str
    cost: ComputeCost
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[int] = ..., address: _Optional[str] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., state: _Optional[str] = ..., transport: _Optional[str] = ..., slots: _Optional[int] = ..., slots_target: _Optional[int] = ..., rows_total: _Optional[int] = ..., metrics_address: _Optional[str] = ..., cost: _Optional[_Union[ComputeCost, _Mapping]] = ...) -> None: ...

class Router(_message.Message):
    __slots__ = ("name", "address", "node", "pid", "state", "running", "waiting", "metrics_address", "max_model_len", "kv_tokens")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    node: str
    pid: int
    state: str
    running: int
    waiting: int
    metrics_address: str
    max_model_len: int
    kv_tokens: int
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., state: _Optional[str] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., metrics_address: _Optional[str] = ..., max_model_len: _Optional[int] = ..., kv_tokens: _Optional[int] = ...) -> None: ...

class Ingress(_message.Message):
    __slots__ = ("name", "node", "pid", "http", "metrics_address")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HTTP_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    name: str
    node: str
    pid: int
    http: str
    metrics_address: str
    def __init__(self, name: _Optional[str] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., http: _Optional[str] = ..., metrics_address: _Optional[str] = ...) -> None: ...

class ClusterView(_message.Message):
    __slots__ = ("version", "placement", "hosts", "routers", "draining")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    version: int
    placement: Placement
    hosts: _containers.RepeatedCompositeFieldContainer[Host]
    routers: _containers.RepeatedCompositeFieldContainer[Router]
    draining: bool
    def __init__(self, version: _Optional[int] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ..., hosts: _Optional[_Iterable[_Union[Host, _Mapping]]] = ..., routers: _Optional[_Iterable[_Union[Router, _Mapping]]] = ..., draining: _Optional[bool] = ...) -> None: ...

class Controller(_message.Message):
    __slots__ = ("pid", "address", "node", "epoch", "version", "term", "metrics_address", "prometheus")
    PID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PROMETHEUS_FIELD_NUMBER: _ClassVar[int]
    pid: int
    address: str
    node: str
    epoch: int
    version: int
    term: int
    metrics_address: str
    prometheus: str
    def __init__(self, pid: _Optional[int] = ..., address: _Optional[str] = ..., node: _Optional[str] = ..., epoch: _Optional[int] = ..., version: _Optional[int] = ..., term: _Optional[int] = ..., metrics_address: _Optional[str] = ..., prometheus: _Optional[str] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("name", "controller", "ingresses", "routers", "hosts", "replicas_held", "replicas_wanted", "draining", "problems", "placement")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    INGRESSES_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_HELD_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_WANTED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    controller: Controller
    ingresses: _containers.RepeatedCompositeFieldContainer[Ingress]
    routers: _containers.RepeatedCompositeFieldContainer[Router]
    hosts: _containers.RepeatedCompositeFieldContainer[Host]
    replicas_held: int
    replicas_wanted: int
    draining: bool
    problems: _containers.RepeatedScalarFieldContainer[str]
    placement: PlacementStatus
    def __init__(self, name: _Optional[str] = ..., controller: _Optional[_Union[Controller, _Mapping]] = ..., ingresses: _Optional[_Iterable[_Union[Ingress, _Mapping]]] = ..., routers: _Optional[_Iterable[_Union[Router, _Mapping]]] = ..., hosts: _Optional[_Iterable[_Union[Host, _Mapping]]] = ..., replicas_held: _Optional[int] = ..., replicas_wanted: _Optional[int] = ..., draining: _Optional[bool] = ..., problems: _Optional[_Iterable[str]] = ..., placement: _Optional[_Union[PlacementStatus, _Mapping]] = ...) -> None: ...

class PlacementStatus(_message.Message):
    __slots__ = ("rebalances", "held_by", "is_moving", "loading", "draining", "loaded_total", "given_up_total", "predicted", "realised")
    REBALANCES_FIELD_NUMBER: _ClassVar[int]
    HELD_BY_FIELD_NUMBER: _ClassVar[int]
    IS_MOVING_FIELD_NUMBER: _ClassVar[int]
    LOADING_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    LOADED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    GIVEN_UP_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    REALISED_FIELD_NUMBER: _ClassVar[int]
    rebalances: bool
    held_by: str
    is_moving: bool
    loading: int
    draining: int
    loaded_total: int
    given_up_total: int
    predicted: float
    realised: float
    def __init__(self, rebalances: _Optional[bool] = ..., held_by: _Optional[str] = ..., is_moving: _Optional[bool] = ..., loading: _Optional[int] = ..., draining: _Optional[int] = ..., loaded_total: _Optional[int] = ..., given_up_total: _Optional[int] = ..., predicted: _Optional[float] = ..., realised: _Optional[float] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CutRequest(_message.Message):
    __slots__ = ("host", "ms")
    HOST_FIELD_NUMBER: _ClassVar[int]
    MS_FIELD_NUMBER: _ClassVar[int]
    host: str
    ms: int
    def __init__(self, host: _Optional[str] = ..., ms: _Optional[int] = ...) -> None: ...

class CutResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShutdownRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShutdownResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LayerRates(_message.Message):
    __slots__ = ("layer", "experts", "rows_per_s")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_S_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    rows_per_s: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ..., rows_per_s: _Optional[_Iterable[float]] = ...) -> None: ...

class PlanRequest(_message.Message):
    __slots__ = ("apply", "load")
    APPLY_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    apply: bool
    load: _containers.RepeatedCompositeFieldContainer[LayerRates]
    def __init__(self, apply: _Optional[bool] = ..., load: _Optional[_Iterable[_Union[LayerRates, _Mapping]]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("field", "value", "rule")
    FIELD_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    field: str
    value: str
    rule: str
    def __init__(self, field: _Optional[str] = ..., value: _Optional[str] = ..., rule: _Optional[str] = ...) -> None: ...

class PlanResponse(_message.Message):
    __slots__ = ("refusal", "text", "json")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    refusal: Refusal
    text: str
    json: str
    def __init__(self, refusal: _Optional[_Union[Refusal, _Mapping]] = ..., text: _Optional[str] = ..., json: _Optional[str] = ...) -> None: ...

class PlaceRequest(_message.Message):
    __slots__ = ("move", "drain_host", "placement", "rollback", "num_hosts")
    class Move(_message.Message):
        __slots__ = ("layer", "expert", "to")
        LAYER_FIELD_NUMBER: _ClassVar[int]
        EXPERT_FIELD_NUMBER: _ClassVar[int]
        TO_FIELD_NUMBER: _ClassVar[int]
        layer: int
        expert: int
        to: str
        def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., to: _Optional[str] = ...) -> None: ...
    class Rollback(_message.Message):
        __slots__ = ("epoch",)
        EPOCH_FIELD_NUMBER: _ClassVar[int]
        epoch: int
        def __init__(self, epoch: _Optional[int] = ...) -> None: ...
    MOVE_FIELD_NUMBER: _ClassVar[int]
    DRAIN_HOST_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    ROLLBACK_FIELD_NUMBER: _ClassVar[int]
    NUM_HOSTS_FIELD_NUMBER: _ClassVar[int]
    move: PlaceRequest.Move
    drain_host: str
    placement: Placement
    rollback: PlaceRequest.Rollback
    num_hosts: int
    def __init__(self, move: _Optional[_Union[PlaceRequest.Move, _Mapping]] = ..., drain_host: _Optional[str] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ..., rollback: _Optional[_Union[PlaceRequest.Rollback, _Mapping]] = ..., num_hosts: _Optional[int] = ...) -> None: ...

class PlaceResponse(_message.Message):
    __slots__ = ("refusal", "loads", "epoch")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    refusal: Refusal
    loads: int
    epoch: int
    def __init__(self, refusal: _Optional[_Union[Refusal, _Mapping]] = ..., loads: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class HistoryRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AppliedPlan(_message.Message):
    __slots__ = ("age_s", "epoch", "loads", "moved_bytes", "before", "predicted", "realised", "took_s", "why", "is_undone")
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    MOVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    REALISED_FIELD_NUMBER: _ClassVar[int]
    TOOK_S_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    IS_UNDONE_FIELD_NUMBER: _ClassVar[int]
    age_s: float
    epoch: int
    loads: int
    moved_bytes: int
    before: float
    predicted: float
    realised: float
    took_s: float
    why: str
    is_undone: bool
    def __init__(self, age_s: _Optional[float] = ..., epoch: _Optional[int] = ..., loads: _Optional[int] = ..., moved_bytes: _Optional[int] = ..., before: _Optional[float] = ..., predicted: _Optional[float] = ..., realised: _Optional[float] = ..., took_s: _Optional[float] = ..., why: _Optional[str] = ..., is_undone: _Optional[bool] = ...) -> None: ...

class HistoryResponse(_message.Message):
    __slots__ = ("plans",)
    PLANS_FIELD_NUMBER: _ClassVar[int]
    plans: _containers.RepeatedCompositeFieldContainer[AppliedPlan]
    def __init__(self, plans: _Optional[_Iterable[_Union[AppliedPlan, _Mapping]]] = ...) -> None: ...

class RowsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RowsResponse(_message.Message):
    __slots__ = ("hosts", "experts")
    class Counted(_message.Message):
        __slots__ = ("host", "incarnation", "rows")
        HOST_FIELD_NUMBER: _ClassVar[int]
        INCARNATION_FIELD_NUMBER: _ClassVar[int]
        ROWS_FIELD_NUMBER: _ClassVar[int]
        host: str
        incarnation: int
        rows: _containers.RepeatedCompositeFieldContainer[LayerRows]
        def __init__(self, host: _Optional[str] = ..., incarnation: _Optional[int] = ..., rows: _Optional[_Iterable[_Union[LayerRows, _Mapping]]] = ...) -> None: ...
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    hosts: _containers.RepeatedCompositeFieldContainer[RowsResponse.Counted]
    experts: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    def __init__(self, hosts: _Optional[_Iterable[_Union[RowsResponse.Counted, _Mapping]]] = ..., experts: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ...) -> None: ...
