from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_FLOAT32: _ClassVar[Dtype]
    DTYPE_BFLOAT16: _ClassVar[Dtype]
    DTYPE_FLOAT16: _ClassVar[Dtype]
DTYPE_UNSPECIFIED: Dtype
DTYPE_FLOAT32: Dtype
DTYPE_BFLOAT16: Dtype
DTYPE_FLOAT16: Dtype

class Hello(_message.Message):
    __slots__ = ("protocol_version", "checkpoint_digest", "dtype", "hidden_size", "router_name")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    ROUTER_NAME_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    checkpoint_digest: str
    dtype: Dtype
    hidden_size: int
    router_name: str
    def __init__(self, protocol_version: _Optional[int] = ..., checkpoint_digest: _Optional[str] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., hidden_size: _Optional[int] = ..., router_name: _Optional[str] = ...) -> None: ...

class Want(_message.Message):
    __slots__ = ("hello", "key")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    key: ExpertKey
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., key: _Optional[_Union[ExpertKey, _Mapping]] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("offset", "total_bytes", "gate_up_checksum", "down_checksum")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    GATE_UP_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    DOWN_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    offset: int
    total_bytes: int
    gate_up_checksum: int
    down_checksum: int
    def __init__(self, offset: _Optional[int] = ..., total_bytes: _Optional[int] = ..., gate_up_checksum: _Optional[int] = ..., down_checksum: _Optional[int] = ...) -> None: ...

class HostHello(_message.Message):
    __slots__ = ("host_name", "incarnation", "max_message_bytes")
    HOST_NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    host_name: str
    incarnation: int
    max_message_bytes: int
    def __init__(self, host_name: _Optional[str] = ..., incarnation: _Optional[int] = ..., max_message_bytes: _Optional[int] = ...) -> None: ...

class ExpertKey(_message.Message):
    __slots__ = ("layer", "expert")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("kind", "missing", "message")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Error.Kind]
        KIND_NOT_HOSTED: _ClassVar[Error.Kind]
        KIND_FAILED: _ClassVar[Error.Kind]
        KIND_BAD_FRAME: _ClassVar[Error.Kind]
        KIND_MISMATCH: _ClassVar[Error.Kind]
        KIND_EXPIRED: _ClassVar[Error.Kind]
    KIND_UNSPECIFIED: Error.Kind
    KIND_NOT_HOSTED: Error.Kind
    KIND_FAILED: Error.Kind
    KIND_BAD_FRAME: Error.Kind
    KIND_MISMATCH: Error.Kind
    KIND_EXPIRED: Error.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    kind: Error.Kind
    missing: _containers.RepeatedCompositeFieldContainer[ExpertKey]
    message: str
    def __init__(self, kind: _Optional[_Union[Error.Kind, str]] = ..., missing: _Optional[_Iterable[_Union[ExpertKey, _Mapping]]] = ..., message: _Optional[str] = ...) -> None: ...
