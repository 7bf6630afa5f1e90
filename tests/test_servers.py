"""Real servers: started, spoken to over the bridge and over a published port, and stopped by their signal."""

import os
import signal
import socket

import pytest
from containers import free_port, until

pytestmark = pytest.mark.slow

SERVERS = {  # image: port, question, what the answer has, its StopSignal
    "tomcat": (8080, b"GET / HTTP/1.0\r\n\r\n", b"HTTP/1.1 200", signal.SIGTERM),
    "rabbitmq": (5672, b"AMQP\0\0\x09\x01", b"publisher_confirms", signal.SIGTERM),
    "nginx": (80, b"GET / HTTP/1.0\r\n\r\n", b"Welcome to nginx!", signal.SIGQUIT),
    "redis": (6379, b"PING\r\n", b"+PONG", signal.SIGTERM),
    "postgres": (5432, b"\0\0\0\x08\x04\xd2\x16\x2f", b"N", signal.SIGINT),
}


def answer(address, port, question):
    """What a server says to a question; nothing while it isn't up."""
    try:
        with socket.create_connection((address, port), timeout=5) as connection:
            connection.sendall(question)
            said = b""
            while piece := connection.recv(65536):
                said += piece
                if not question.startswith(b"GET"):
                    break
            return said
    except OSError:
        return b""


@pytest.mark.parametrize("name", SERVERS)
def test_a_server(name, registry, store, start):
    registry.need(f"library/{name}")
    store("pull", "-q", name, check=True, timeout=300)
    port, question, expected, stop = SERVERS[name]
    published = free_port()
    server = start("--rm", "-p", f"{published}:{port}", f"library/{name}")
    until(lambda: expected in answer(server.address, port, question), f"{name} does not answer", seconds=120)
    assert server.address.startswith("10.0.")
    assert expected in answer("127.0.0.1", published, question)
    os.kill(server.process.pid, stop)
    server.process.communicate(timeout=60)
    assert server.process.returncode in (0, 128 + stop, 143), server.process.returncode
    assert not os.path.exists(f"/sys/class/net/veth0_{server.id}")
