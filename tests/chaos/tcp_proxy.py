"""A TCP proxy that stands for a bad network: it delays, cuts, swallows, and closes at once.

It runs in a thread of its own, so that it lives as long as the processes that
connect through it, whatever test is running.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading


class TcpProxy:
    """Faults are attributes; a test sets them and `heal` takes them back."""

    def __init__(self, port: int, upstream: int) -> None:
        self.port = port
        self.upstream = upstream
        self.latency = 0.0  # seconds that every chunk from the server is late
        self.idle_seconds: float | None = None  # a server that is silent for so long loses the connection
        self.cuts = 0  # so many of the next chunks from the server are cut in the middle, and the connection with them
        self.refuses = False  # new connections are closed at once, as a proxy without a server behind it does
        self.connected = 0  # connections since the start
        self._silent = False
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._pairs: set[_Pair] = set()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()

    def swallow(self) -> None:
        """From now on nothing arrives and nobody is told; connections of this time stay dead for ever."""
        self._silent = True
        for pair in tuple(self._pairs):
            pair.dead = True

    def hang_up(self) -> None:
        """Reset every connection."""
        for pair in tuple(self._pairs):
            self._loop.call_soon_threadsafe(pair.abort)

    def heal(self) -> None:
        self.latency, self.cuts, self.refuses, self._silent = 0.0, 0, False, False
        self.idle_seconds = None

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._handle, "127.0.0.1", self.port, backlog=1024)
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0.05)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connected += 1
        if self.refuses:
            writer.transport.abort()
            return
        pair = _Pair(self, writer, dead=self._silent)
        self._pairs.add(pair)
        try:
            await pair.carry(reader)
        except OSError:
            pass
        finally:
            pair.abort()
            self._pairs.discard(pair)


class _Pair:
    """One connection of a client and the one to the server that belongs to it."""

    def __init__(self, proxy: TcpProxy, writer: asyncio.StreamWriter, *, dead: bool) -> None:
        self._proxy, self._writer, self.dead = proxy, writer, dead
        self._up_writer: asyncio.StreamWriter | None = None

    def abort(self) -> None:
        for writer in (self._writer, self._up_writer):
            if writer is not None:
                writer.transport.abort()

    async def carry(self, reader: asyncio.StreamReader) -> None:
        if self.dead:
            while await reader.read(65536):
                pass
            return
        up_reader, self._up_writer = await asyncio.open_connection("127.0.0.1", self._proxy.upstream)
        replies = asyncio.create_task(self._replies(up_reader))
        try:
            while data := await reader.read(65536):
                if not self.dead:
                    self._up_writer.write(data)
            # A client that hangs up on a dead line: its FIN does not arrive either, and nobody waits for it.
        finally:
            replies.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await replies

    async def _replies(self, up_reader: asyncio.StreamReader) -> None:
        proxy = self._proxy
        while data := await self._next(up_reader):
            if proxy.latency:
                await asyncio.sleep(proxy.latency)
            if self.dead:
                continue
            if proxy.cuts > 0:
                proxy.cuts -= 1
                self._writer.write(data[: len(data) // 2])
                await self._writer.drain()
                break
            self._writer.write(data)
        if not self.dead:
            self._writer.close()

    async def _next(self, up_reader: asyncio.StreamReader) -> bytes:
        """What the server says next; nothing if it has closed, or was silent for too long."""
        try:
            async with asyncio.timeout(self._proxy.idle_seconds):
                return await up_reader.read(65536)
        except TimeoutError:
            return b""
