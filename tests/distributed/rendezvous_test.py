"""Tasks find each other, and nothing else that answers on their addresses is taken for a task."""

import contextlib
import http.server
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent import futures

import grpc
import pytest

from tests.launching import ROOT
from tf_largebatch.distributed import rendezvous
from tf_largebatch.distributed.cluster import Cluster
from tf_largebatch.errors import InterruptedRunError, UserError
from tools.launch_local import free_addresses


def test_rejects_a_port_in_use():
  with socket.socket() as listener:
    # As gRPC listens. The check must not succeed by sharing the port.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("", 0))
    listener.listen()
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(UserError, match=re.escape(f"{address} (Address already in use)")) as raised:
      rendezvous.wait_for_all(Cluster(("127.0.0.1:1", address), 1), 1.0)
  assert "\n" not in str(raised.value)


def test_a_port_is_free_as_soon_as_the_previous_run_has_ended():
  with socket.socket() as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    address = listener.getsockname()
    with socket.create_connection(address) as client:
      listener.accept()[0].close()  # The side that closes first is left in TIME_WAIT.
      client.recv(1)
  with rendezvous.listening(Cluster((f"127.0.0.1:{address[1]}",))):
    pass


# Each task has its own name for the others, as where their machines' names differ.
@pytest.mark.parametrize("hosts", [["127.0.0.1"] * 3, ["[::1]"] * 3, ["localhost", "[::1]", "::"]])
def test_waits_for_all_tasks(hosts):
  if "[::1]" in hosts and not socket.has_dualstack_ipv6():
    pytest.skip("This machine has no IPv6.")
  ports = [address.rpartition(":")[2] for address in free_addresses(3)]
  addresses = tuple(f"{host}:{port}" for host, port in zip(hosts, ports, strict=True))
  done = []

  def wait(index):
    cluster = Cluster(addresses, index)
    rendezvous.wait_for_all(cluster, 1.0)
    done.append(index)
    with rendezvous.listening(cluster):
      ended.wait(30)

  ended = threading.Event()
  threads = [threading.Thread(target=wait, args=(index,)) for index in range(3)]
  try:
    for thread in threads[:2]:
      thread.start()
    time.sleep(0.5)
    assert done == []
    threads[2].start()
    deadline = time.monotonic() + 20
    while len(done) < 3 and time.monotonic() < deadline:
      time.sleep(0.01)
    assert sorted(done) == [0, 1, 2]
  finally:
    ended.set()
    for thread in threads:
      thread.join()


def test_a_machine_without_ipv6(monkeypatch):
  monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
  (address,) = free_addresses(1)
  cluster = Cluster((address, "127.0.0.1:1"))
  with rendezvous.listening(cluster):
    assert rendezvous._probe(Cluster(cluster.tasks, 1), address) is None


def test_names_the_tasks_that_did_not_come_up():
  addresses = tuple(free_addresses(3))
  with rendezvous.listening(Cluster(addresses, 1)), pytest.raises(InterruptedRunError) as error:
    rendezvous.wait_for_all(Cluster(addresses, 0), 0.001)
  assert str(error.value).startswith(
    f"task 2 ({addresses[2]}) did not come up within 0.001 minutes (Connection refused); start"
  )
  assert error.value.status == 138


def test_names_a_host_that_does_not_exist():
  own, *_ = free_addresses(1)
  with pytest.raises(
    InterruptedRunError, match=r"task 1 \(nowhere.invalid:1\) did not .* not known"
  ):
    rendezvous.wait_for_all(Cluster((own, "nowhere.invalid:1")), 0.001)


@contextlib.contextmanager
def serving(answer):
  """A program that sends `answer` to whoever connects; None: a web server."""
  if answer is None:
    with http.server.ThreadingHTTPServer(("", 0), http.server.BaseHTTPRequestHandler) as server:
      thread = threading.Thread(target=server.serve_forever)
      thread.start()
      yield server.server_address[1]
      server.shutdown()
      thread.join()
    return
  with socket.create_server(("127.0.0.1", 0)) as listener:

    def serve():
      with contextlib.suppress(OSError):
        while True:
          connection, _ = listener.accept()
          with connection:
            connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize(
  "answer, seen",
  [
    (None, r"another program \(it sent: HTTP/1.0 501"),
    (b"SSH-2.0-OpenSSH_9.2\r\n", r"another program \(it sent: SSH-2.0-OpenSSH_9.2\)"),
    (b"tf_largebatch task 1 of 3\n", "tf_largebatch task 1 of 3"),  # Another run's.
  ],
)
def test_another_program_on_a_tasks_port_is_named(answer, seen):
  with serving(answer) as port:
    cluster = Cluster((*free_addresses(1), f"127.0.0.1:{port}"))
    expected = rf"^{seen}.* answers instead of task 1 \(127.0.0.1:{port}\); end it"
    with pytest.raises(UserError, match=expected):
      rendezvous.wait_for_all(cluster, 0.001)


def test_a_program_that_does_not_answer_is_not_a_task():
  with serving(b"") as port:
    cluster = Cluster((*free_addresses(1), f"127.0.0.1:{port}"))
    with pytest.raises(InterruptedRunError, match=r"did not come up .* \(no answer\)"):
      rendezvous.wait_for_all(cluster, 0.001)


def test_one_task_under_two_names():
  port = free_addresses(1)[0].rpartition(":")[2]
  cluster = Cluster((f"127.0.0.1:{port}", f"localhost:{port}"))
  with pytest.raises(UserError, match="task 0 of 2 answers instead of task 1"):
    rendezvous.wait_for_all(cluster, 0.001)


def test_a_task_that_tensorflow_serves_already_counts():
  server = grpc.server(futures.ThreadPoolExecutor(1))
  port = server.add_insecure_port("127.0.0.1:0")
  server.start()
  try:
    rendezvous.wait_for_all(Cluster((*free_addresses(1), f"127.0.0.1:{port}")), 0.001)
  finally:
    server.stop(None).wait()


@pytest.mark.parametrize(
  "before, after",
  [
    ({}, None),
    ({"no_proxy": "x"}, None),
    ({"http_proxy": "http://p"}, "::1,a.b"),
    ({"grpc_proxy": "http://p", "no_proxy": "x,y"}, "x,y,::1,a.b"),
    ({"https_proxy": "http://p", "no_proxy": "x", "no_grpc_proxy": "z"}, "z,::1,a.b"),
  ],
)
def test_the_clusters_hosts_bypass_proxies(monkeypatch, before, after):
  for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_proxy", "no_grpc_proxy"):
    monkeypatch.delenv(name, raising=False)
  for name, value in before.items():
    monkeypatch.setenv(name, value)
  rendezvous.bypass_proxies(Cluster(("a.b:1", "[::1]:2", "a.b:3")))
  changed = {"no_grpc_proxy": after} if after else {}
  names = (*before, "no_grpc_proxy")
  assert {name: os.environ[name] for name in names if name in os.environ} == {**before, **changed}


def test_a_time_limit_ends_a_process_that_holds_the_interpreters_lock():
  program = """
from tf_largebatch.distributed.rendezvous import ended_after
with ended_after(1.0):
  pass
with ended_after(0.01):
  sum(range(10**12))
"""
  command = [sys.executable, "-c", program]
  finished = subprocess.run(
    command, cwd=ROOT, timeout=60, check=False, capture_output=True, text=True
  )
  assert finished.returncode == 138
  (line,) = finished.stderr.splitlines()
  assert line.startswith("error: All tasks came up, but TensorFlow did not connect them with")
