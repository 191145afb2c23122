"""A small W&B server on loopback that real W&B processes talk to, and what they leave on disk.

The server keeps the history of each run as lines at offsets, as W&B's file stream sends them, and tells a resuming run
how many it has. It can be silent, or fall silent or go away in the middle. How the real server merges what several
attempts send is not to be seen here.
"""

import gzip
import http.server
import json
import re
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class WandbServer(http.server.ThreadingHTTPServer):
    """Answers as long as `silent` is not set; a context manager."""

    daemon_threads = True

    def __init__(self) -> None:
        """Listens on a free port."""
        self.silent = threading.Event()
        self.histories: dict[str, dict[int, dict[str, Any]]] = {}
        self.received = b""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """Returns the history of a run in its order."""
        return [row for _, row in sorted(self.histories.get(run_id, {}).items())]

    def go_away(self) -> None:
        """Stops listening, and answers nothing that has come."""
        self.silent.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may end whenever they want."""

    def __exit__(self, *error: object) -> None:
        """Goes away."""
        self.go_away()

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Returns the data that a GraphQL operation asks for."""
        project = {"id": "p", "name": "tubelet", "entity": {"id": "e", "name": "me"}}
        run = {"id": "UnVuOg==", "name": variables.get("name"), "displayName": "run", "project": project}
        if operation == "RunResumeStatus" and variables["name"] in self.histories:
            lines = len(self.histories[variables["name"]])
            counts = {"historyLineCount": lines, "logLineCount": 0, "eventsLineCount": 0}
            tails = {"historyTail": "[]", "eventsTail": "[]", "summaryMetrics": "{}", "config": "{}"}
            bucket = run | counts | tails | {"wandbConfig": '{"t": 1}', "tags": []}
            return {"model": project | {"bucket": bucket}}
        if operation == "UpsertBucket":
            inserted = variables["name"] not in self.histories
            self.histories.setdefault(variables["name"], {})
            bucket = run | {"config": variables.get("config"), "historyLineCount": 0}
            return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": run["id"], "uploadHeaders": [], "files": files}}
        return {}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        while self.server.silent.is_set():
            time.sleep(0.1)
        self.server.received += body
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1]
            answer = {"data": self.server.answer(operation, asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            sent = (json.loads(body).get("files") or {}).get("wandb-history.jsonl", {"content": []})
            history = self.server.histories[self.path.split("/")[-2]]
            history.update((sent["offset"] + place, json.loads(line)) for place, line in enumerate(sent["content"]))
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST

    def log_message(self, *arguments: Any) -> None:
        pass


def wandb_history(out: Path, folders: str = "offline-run-*") -> list[dict[str, Any]]:
    """Returns the history rows in a run folder's .wandb files, oldest file first; a torn end is passed over."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for path in sorted((out / "wandb").glob(f"{folders}/*.wandb")):
        for content in records_of(path.read_bytes()):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def records_of(content: bytes) -> Iterator[bytes]:
    """Yields the whole records of a .wandb file: seven bytes, then LevelDB's log format in blocks of 32 KiB."""
    place, parts = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _checksum, size_bytes, kind = struct.unpack_from("<IHB", content, place)
        if place + 7 + size_bytes > len(content):
            return
        parts += content[place + 7 : place + 7 + size_bytes]
        place += 7 + size_bytes
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""
