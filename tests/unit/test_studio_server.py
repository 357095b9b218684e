"""What the studio's server refuses: files of the machine, other websites, and visitors without the token."""

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from latentact.errors import UserError
from latentact.lams.models.lapo import LapoConfig
from latentact.quantizers.fsq import FsqConfig
from latentact.stages import studio
from latentact.stages.studio import StudioConfig
from toy_studio import SHAPE, save_lam

pytest.importorskip("gradio")
pytestmark = pytest.mark.filterwarnings("ignore:Using `httpx`")


@pytest.fixture(scope="module")
def served(blocks, tmp_path_factory):
    from latentact.studio import server

    root = tmp_path_factory.mktemp("served")
    save_lam(root / "lam", LapoConfig(**SHAPE, bottleneck=FsqConfig(positions=1, levels=(3, 3))))
    config = StudioConfig(run=str(root / "lam"), data=str(blocks), out=str(root / "out"))
    return SimpleNamespace(server=server, work=studio.open_workspace(config), root=root)


@pytest.fixture(scope="module")
def client(served):
    from starlette.testclient import TestClient

    app = served.server.make_app(served.work)
    with TestClient(app, base_url="http://127.0.0.1:7860", raise_server_exceptions=False) as client:
        yield client


def test_the_page_loads_and_asks_no_other_host(client):
    page = client.get("/")
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "fonts.googleapis" not in page.text
    assert client.get("/config").json()["analytics_enabled"] is False


@pytest.mark.parametrize(
    "prefix", ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/"]
)
@pytest.mark.parametrize(
    "place",
    [
        *("/etc/passwd", "//etc/passwd", "../../../../../../etc/passwd", "..%2f..%2f..%2f..%2fetc%2fpasswd"),
        *("%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "file:///etc/passwd", "/proc/self/environ"),
    ],
)
def test_no_file_of_the_machine_is_served(client, prefix, place):
    answer = client.get(prefix + place)
    assert answer.status_code >= 400
    assert "root:" not in answer.text
    assert "PATH=" not in answer.text


@pytest.mark.parametrize("url", ["http://169.254.169.254/", "http://127.0.0.1:22/", "file:///etc/passwd"])
def test_the_server_fetches_nothing(client, url):
    for route in ("/gradio_api/proxy=", "/proxy=", "/gradio_api/file="):
        assert client.get(route + url, follow_redirects=False).status_code >= 400


def test_no_file_of_the_project_is_served(client, served, blocks):
    served.work.out.mkdir(exist_ok=True)
    (served.work.out / "note.txt").write_text("secret")
    (served.work.out / "link.txt").symlink_to("/etc/passwd")
    inside = (
        served.work.out / "note.txt",
        served.work.out / "link.txt",
        blocks,
        served.root / "lam/spec.json",
    )
    for path in inside:
        assert client.get(f"/gradio_api/file={path}").status_code >= 400


def test_an_upload_stays_in_its_folder(client, served):
    name = "../../../escaped.mp4"
    answer = client.post("/gradio_api/upload", files={"files": (name, b"x", "video/mp4")})
    assert answer.status_code == 200
    assert Path(answer.json()[0]).name == "escaped.mp4"
    assert ".." not in answer.json()[0]


def test_a_path_in_place_of_an_upload_is_refused(client):
    """The handler of uploads takes only files that were uploaded."""
    config = client.get("/config").json()
    upload = next(each["id"] for each in config["components"] if each["type"] == "uploadbutton")
    event = next(each["id"] for each in config["dependencies"] if [upload, "upload"] in each["targets"])
    data = [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]
    body = {"data": data, "fn_index": event, "session_hash": "s"}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 200
    with client.stream("GET", "/gradio_api/queue/data?session_hash=s") as stream:
        text = "".join(line for line in stream.iter_lines())
    assert '"success": false' in text or '"success":false' in text
    assert "root:" not in text


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"host": "evil.example"}, "must be opened as"),
        ({"host": "127.0.0.1.evil.example"}, "must be opened as"),
        ({"origin": "http://evil.example"}, "its own page only"),
        ({"origin": "null"}, "its own page only"),
    ],
)
def test_other_websites_are_refused(client, headers, message):
    answer = client.get("/", headers=headers)
    assert answer.status_code == 403
    assert message in answer.text


def test_other_hosts_need_the_token(served):
    from starlette.testclient import TestClient

    app = served.server.Guard(client_app, "a" * 16, loopback=False)
    client = TestClient(app, base_url="http://robot.local:7860", follow_redirects=False)
    for path in ("/", "/?token=wrong", "/gradio_api/info", "/gradio_api/file=/etc/passwd", "/?token="):
        assert client.get(path).status_code == 403
    entry = client.get(f"/?token={'a' * 16}")
    assert (entry.status_code, entry.headers["location"]) == (303, "/")
    assert "HttpOnly; SameSite=Strict" in entry.headers["set-cookie"]
    assert client.get("/").text == "welcome"


async def client_app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"welcome"})


def test_the_address_is_checked_before_the_studio_opens(served):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} cannot be used"):
            served.server.serve(served.work, "127.0.0.1", port, "", lambda address: None)
