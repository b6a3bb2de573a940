"""The server: it answers its own page on this machine, and nobody else."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tenfold.errors import TenfoldError
from tenfold.explorer import Explorer, Query
from tenfold.explorer.server import listening
from tenfold.records import Plan
from tests.explorer.nets import Made
from tests.explorer.served import TOKEN, Client, served

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    return Made().explorer()


@pytest.fixture(scope="module")
def client(explorer: Explorer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with served(explorer, tmp_path_factory.mktemp("out") / "explored.yaml") as found:
        yield found


def test_the_page_is_served_to_whom_knows_the_token(client: Client) -> None:
    status, text, headers = client.ask("GET", f"/{TOKEN}/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in text
    assert "connect-src 'self'" in text
    assert re.findall(r"https?://[^\"' ]+", text) == ["http://www.w3.org/2000/svg"]  # the name of a vocabulary
    assert TOKEN not in text
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["content-security-policy"] == "frame-ancestors 'none'"
    assert "server" not in headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/wrong/", 404),
        ("GET", f"/{TOKEN}x/", 404),
        ("GET", f"/{TOKEN[:-1]}/", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", f"/{TOKEN}/save", 405),
        ("GET", f"/{TOKEN}/nothing", 404),
    ],
)
def test_without_the_token_there_is_nothing(client: Client, method: str, path: str, status: int) -> None:
    found, text, _ = client.ask(method, path)
    assert found == status
    assert len(text) < 100


@pytest.mark.parametrize("host", ["evil.example", "[::1]:{port}", "evil.example:{port}", "127.0.0.1.evil.example", ""])
def test_another_host_is_refused(client: Client, host: str) -> None:
    """A foreign page that points its own name to this machine (DNS rebinding)."""
    status, text, _ = client.ask("GET", f"/{TOKEN}/", headers={"Host": host.format(port=client.port)})
    assert (status, text) == (400, "Invalid host header")
    assert client.ask("GET", f"/{TOKEN}/", headers={"Host": f"localhost:{client.port}"})[0] == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost:{port}"])
def test_another_page_is_refused(client: Client, origin: str) -> None:
    assert client.post("select", {}, Origin=origin.format(port=client.port))[0] == 403
    assert client.post("select", {}, Origin=f"http://127.0.0.1:{client.port}")[0] == 200


def test_what_a_form_could_send_is_refused(client: Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert client.post("save", {}, Content_Type=kind)[0] == 415
    assert not client.service.out.exists()


def test_selections_are_those_of_the_explorer(client: Client, explorer: Explorer) -> None:
    query = {"budget": {"macs": 0.6}, "overrides": {"3": {"format": "low_rank", "option": 5}}}
    status, found = client.post("select", query)
    selection = explorer.select(Query.model_validate(query))
    assert status == 200
    assert found["distortion"] == selection.distortion
    assert found["left"]["macs"] == selection.cost.macs / explorer.table.before.macs
    layer = found["layers"][[layer.path for layer in explorer.table.eligible].index("3")]
    assert (layer["format"], layer["option"], layer["pinned"]) == ("low_rank", 5, True)
    assert {tile["id"] for tile in found["tiles"]} == {"params", "macs", "distortion"}
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("what", "value", "words"),
    [
        ("select", b"{", "invalid request"),
        ("select", b"[1]", "invalid request"),
        ("select", {"rubbish": 1}, "rubbish"),
        ("select", {"budget": {"macs": "much"}}, "invalid request"),
        ("select", {"budget": {"flops": 0.5}}, "flops"),
        ("select", {"budget": {"macs": 2}}, "invalid request"),
        ("select", {"overrides": {"nowhere": {"format": None}}}, "nowhere"),
        ("select", {"overrides": {"3": {"format": "tucker2", "option": -1}}}, "invalid request"),
        ("curve", {"kind": "latency"}, "params or macs"),
        ("curve", {}, "kind of budget"),
        ("curve", b"\xff", "kind of budget"),
    ],
)
def test_bad_input_is_told_in_one_line(client: Client, what: str, value: Any, words: str) -> None:
    status, found = client.post(what, value)
    assert status == 400
    assert words in found["error"]
    assert "\n" not in found["error"]


@pytest.mark.parametrize("what", ["select", "save"])
def test_a_budget_that_cannot_be_met_is_an_answer(client: Client, what: str) -> None:
    """Not a fault of the page, which browsers would report as one."""
    status, found = client.post(what, {"budget": {"macs": 0.001}})
    assert (status, list(found)) == (200, ["error"])
    assert "Raise the budget" in found["error"]


def test_a_large_request_is_refused(client: Client) -> None:
    assert client.post("select", b" " * (2 << 20))[0] == 413


def test_a_curve_is_of_the_best_plans(client: Client, explorer: Explorer) -> None:
    found = client.post("curve", {"kind": "macs"})[1]["points"]
    assert len(found) > 10
    assert found == sorted(found)
    assert [distortion for _, distortion in found] == sorted((distortion for _, distortion in found), reverse=True)
    share, distortion = found[len(found) // 2]
    selection = explorer.select(Query.model_validate({"budget": {"macs": share}}))
    assert selection.distortion == pytest.approx(distortion, rel=2e-3)


def test_save_and_read_back(client: Client, explorer: Explorer) -> None:
    query = {"budget": {"macs": 0.45}, "overrides": {"7": {"format": None}}}
    status, found = client.post("save", query)
    assert status == 200
    assert found["out"] == str(client.service.out)
    plan = Plan.load(found["out"])
    assert plan == explorer.plan(Query.model_validate(query))
    assert [p.name for p in client.service.out.parent.iterdir()] == ["explored.yaml"]  # nothing half-written
    assert client.post("save", {"budget": {"macs": 0.5}})[0] == 200  # saved again
    assert Plan.load(found["out"]).recipe.budget.given == {"macs": 0.5}


def test_a_plan_that_cannot_be_written_is_told(explorer: Explorer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with served(explorer, tmp_path / "file" / "plan.yaml") as client:
        status, found = client.post("save", {"budget": {"macs": 0.5}})
    assert status == 400
    assert "plan.yaml" in found["error"] or "file" in found["error"]


def test_only_this_machine_is_listened_to() -> None:
    with listening(0) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(TenfoldError, match=f"cannot listen at port {port}"):
            listening(port)


def test_no_torch_and_a_clean_end(tmp_path: Path) -> None:
    """As the command runs it: no torch is loaded, the page is served, and an interrupt ends it with 0."""
    explorer = Made().explorer()
    explorer.table.save(tmp_path / "options.json")
    code = f"""if True:
        import sys
        from tenfold.cli import main
        code = main(["explore", {str(tmp_path)!r}, "--no-browser", "--json"])
        sys.exit(3 if "torch" in sys.modules else code)
    """
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        shown = json.loads("".join(lines))
        assert shown["out"] == str(tmp_path / "explored.yaml")
        assert urllib.request.urlopen(shown["url"], timeout=60).status == 200  # noqa: S310 - our own
        process.send_signal(2)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    with socket.socket() as gone:
        assert gone.connect_ex(("127.0.0.1", int(shown["url"].split(":")[2].split("/")[0]))) != 0
