"""How does a stock client use an API whose .proto it has never seen? Descriptors by reflection, as grpcurl does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

Metadata = tuple[tuple[str, str], ...]


class ReflectedService:
    """One service; calls by method name with JSON-like values, as on grpcurl's command line."""

    def __init__(self, channel: grpc.aio.Channel, service: Any, metadata: Metadata) -> None:
        self._channel = channel
        self.descriptor = service
        self._metadata = metadata

    @classmethod
    async def of(cls, channel: grpc.aio.Channel, name: str, metadata: Metadata = ()) -> ReflectedService:
        """Ask the server for the service's files, and for those they import, until nothing is missing."""
        pool = descriptor_pool.DescriptorPool()
        files: dict[str, descriptor_pb2.FileDescriptorProto] = {}
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asks = [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)]
        while asks:
            answers = stub.ServerReflectionInfo(iter(asks), metadata=metadata)
            async for answer in answers:
                for encoded in answer.file_descriptor_response.file_descriptor_proto:
                    file = descriptor_pb2.FileDescriptorProto.FromString(encoded)
                    files[file.name] = file
            missing = {path for file in files.values() for path in file.dependency} - files.keys()
            asks = [reflection_pb2.ServerReflectionRequest(file_by_filename=path) for path in sorted(missing)]
        added: set[str] = set()

        def add(path: str) -> None:
            for needed in files[path].dependency:
                add(needed)
            if path not in added:
                added.add(path)
                pool.Add(files[path])

        for path in files:
            add(path)
        return cls(channel, pool.FindServiceByName(name), metadata)

    async def call(
        self, method: str, values: dict[str, Any] | None = None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """One answer. Raises grpc.aio.AioRpcError."""
        found = self.descriptor.methods_by_name[method]
        path, encode, decode = self._parts(found)
        stub = self._channel.unary_unary(path, request_serializer=encode, response_deserializer=decode)
        answer = await stub(self._request(found, values), timeout=timeout_s, metadata=self._metadata)
        return _values(answer)

    async def stream(
        self, method: str, values: dict[str, Any] | None = None, timeout_s: float | None = None
    ) -> AsyncIterator[dict[str, Any]]:
        """Every answer. Raises grpc.aio.AioRpcError."""
        found = self.descriptor.methods_by_name[method]
        path, encode, decode = self._parts(found)
        stub = self._channel.unary_stream(path, request_serializer=encode, response_deserializer=decode)
        call = stub(self._request(found, values), timeout=timeout_s, metadata=self._metadata)
        try:
            async for answer in call:
                yield _values(answer)
        finally:
            call.cancel()

    def _parts(self, method: Any) -> tuple[str, Any, Any]:
        answer_class = message_factory.GetMessageClass(method.output_type)
        path = f"/{self.descriptor.full_name}/{method.name}"
        return path, lambda message: message.SerializeToString(), answer_class.FromString

    def _request(self, method: Any, values: dict[str, Any] | None) -> Any:
        request = message_factory.GetMessageClass(method.input_type)()
        return json_format.ParseDict(values or {}, request)


def _values(message: Any) -> dict[str, Any]:
    return json_format.MessageToDict(message, preserving_proto_field_name=True)
