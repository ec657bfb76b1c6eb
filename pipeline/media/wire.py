"""Messages between the guard and its child: JSON, and a file of frames when there are any.

Nothing is pickled: what a child sends has passed through code that strangers' files may have
taken over, and is only ever parsed as text.
"""

import array
import json
import socket
import struct
from typing import Any

_HEAD = struct.Struct("<I")
# A plan of every frame of a day of video at 60 a second is under 200 MB.
_MOST_BYTES = 512 << 20


class Closed(Exception):
    """The other side is gone, or speaks nonsense."""


def send(sock: socket.socket, message: dict[str, Any], file: int | None = None) -> None:
    """Send a message, and with it an open file."""
    body = json.dumps(message).encode()
    rights = []
    if file is not None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))]
    sock.sendmsg([_HEAD.pack(len(body))], rights)
    sock.sendall(body)


def receive(sock: socket.socket) -> tuple[dict[str, Any], int | None]:
    """The next message and its file, which then belongs to the caller.

    Raises Closed, and TimeoutError as the socket is set.
    """
    try:
        head, files, _, _ = socket.recv_fds(sock, _HEAD.size, 1)
        if len(head) != _HEAD.size:
            raise Closed
        (size,) = _HEAD.unpack(head)
        if size > _MOST_BYTES:
            raise Closed
        body = bytearray()
        while len(body) < size:
            part = sock.recv(min(size - len(body), 1 << 20))
            if not part:
                raise Closed
            body += part
        message = json.loads(body)
    except (ConnectionError, ValueError) as error:
        raise Closed from error
    return message, files[0] if files else None
