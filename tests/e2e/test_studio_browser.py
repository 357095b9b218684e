"""The studio in a real browser: every page is used, two users do not mix, nothing asks another host."""

import base64
import json
import os
import re
import shutil
import signal
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from conftest import start
from latentact.data.cache import DataConfig, open_store
from latentact.data.store import flagged_rows
from latentact.io.video_writer import write_video
from latentact.lams.contract import load_lam
from latentact.lams.models.lapo import LapoConfig
from latentact.quantizers.fsq import FsqConfig
from latentact.quantizers.none import WhitenedConfig
from latentact.stages import studio
from latentact.stages.studio import StudioConfig
from toy_studio import SHAPE, save_grounded, save_lam, save_policy, write_moving_block, write_pusht

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
CAMERA = "observation.images.top"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("browser")
    config = LapoConfig(**SHAPE, bottleneck=WhitenedConfig(dim=4))
    save_policy(root / "guided", save_lam(root / "lam", config, camera=CAMERA).spec)
    write_pusht(root / "data.npz", episodes=3)
    return root


@contextmanager
def served(root, data, *flags):
    """The command, on a free port; yields its address."""
    log = root / "log.txt"
    flags = (*flags, "--out", root / "out", "--port", "0")
    process = start("studio", root / "lam", "--data", root / data, *flags, log=log)
    while not (found := re.search(r"http://\S+(?=;)", log.read_text() if log.exists() else "")):
        assert process.is_alive(), log.read_text()
        time.sleep(0.1)
    try:
        yield found.group()
    finally:
        os.kill(process.pid, signal.SIGINT)
        process.join(30)
    assert process.exitcode == 0, log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def address(root):
    with served(root, "data.npz", "--policy", root / "guided", "--env", "pusht") as found:
        yield found


@pytest.fixture
def visit(browser, address):
    """Return a function that opens the studio as another user; afterwards no page had an error."""
    contexts, wrong = [], []

    def opened():
        contexts.append(browser.new_context())
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda r: wrong.append(r.url) if outside(r.url, address) else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.goto(address)
        page.wait_for_selector("#studio-look canvas.st-frame")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def outside(url, address):
    return not url.startswith((address, "data:", "blob:"))


def tab(page, name):
    page.get_by_role("tab", name=name).click()


def press(page, name):
    page.get_by_role("button", name=name, exact=True).filter(visible=True).click()


def test_a_newcomer_uses_every_page(visit, root):
    page = visit()
    page.wait_for_selector("text=Saliency of step 0")
    timeline = page.locator("#studio-look .st-timeline")
    box = timeline.bounding_box()
    timeline.click(position={"x": 96 + 0.53 * (box["width"] - 96), "y": 10})
    page.wait_for_selector("text=Saliency of step 7")
    assert "step 7 of 14" in page.locator("#studio-look .st-facts").inner_text()

    tab(page, "What does it mean?")
    page.wait_for_selector(".st-group h3")
    assert page.locator(".st-group").count() == 8
    assert "A linear probe" in page.locator(".st-what", has_text="Numbers are").inner_text()

    tab(page, "Edit")
    press(page, "Apply")
    page.wait_for_selector("text=version 2 of 2, 14 steps")
    page.wait_for_selector("text=guide, imagined")
    press(page, "Run the policy")
    page.wait_for_selector("text=Rollout: 14 steps")
    page.get_by_label("name", exact=True).fill("half")
    press(page, "Save guide and video")
    page.wait_for_selector("text=Saved:")
    assert {path.name for path in (root / "out").rglob("*.*")} == {"half.safetensors", "half.mp4"}
    page.get_by_label("name", exact=True).fill("../half")
    press(page, "Save guide and video")
    page.wait_for_selector(".st-warn >> text=the name must be")

    tab(page, "Drive")
    press(page, "Start")
    page.wait_for_selector(".st-key")
    page.keyboard.press("2")
    page.wait_for_selector("text=1 steps · last: cluster 2, robot action")

    tab(page, "Live")
    press(page, "Start")
    page.wait_for_selector("text=The demonstration has ended.")
    assert page.locator("th", has_text="capture to action").is_visible()


def test_an_episode_is_labeled(browser, tmp_path_factory, blocks):
    """Proposals, a label by hand, pseudo-labels, and the dataset with them."""
    root = tmp_path_factory.mktemp("label")
    spec = save_lam(root / "lam", LapoConfig(**SHAPE, bottleneck=WhitenedConfig(dim=4)), camera=CAMERA).spec
    save_grounded(root / "ground", spec, CAMERA)
    write_moving_block(root, blocks, CAMERA)
    with served(root, "data", "--policy", root / "ground") as address:
        page = browser.new_page()
        page.set_default_timeout(20_000)
        page.goto(address)
        page.wait_for_selector("#studio-look canvas.st-frame")
        tab(page, "Label")
        page.get_by_label("budget").fill("3")
        press(page, "Propose episodes")
        page.wait_for_selector("text=coverage with it")
        assert page.locator(".st-table tr").filter(visible=True).count() == 4
        press(page, "Open for labeling")
        page.wait_for_selector("text=0 of 11 steps labeled (drag to select)")
        timeline = page.locator("#studio-label .st-timeline")
        timeline.scroll_into_view_if_needed()
        box = timeline.bounding_box()
        across = [box["x"] + 96 + share * (box["width"] - 96) for share in (0.2, 0.5)]
        page.mouse.move(across[0], box["y"] + 8)
        page.mouse.down()
        page.mouse.move(across[1], box["y"] + 8, steps=4)
        page.mouse.up()
        playwright.expect(page.get_by_label("first step")).to_have_value("2")
        playwright.expect(page.get_by_label("before step")).to_have_value("6")
        page.get_by_label("action").filter(visible=True).click()
        page.get_by_role("option", name="down").click()
        press(page, "Set")
        page.wait_for_selector("text=4 of 11 steps labeled (drag to select)")
        press(page, "Save episode")
        page.wait_for_selector("text=Saved: 4 of 11 steps")
        press(page, "Accept all")
        page.wait_for_selector("text=11 of 11 steps labeled (drag to select)")
        page.get_by_label("before step").fill("40")
        press(page, "Set")
        page.wait_for_selector(".st-warn >> text=the first step and the end must be between 0 and 11")
        press(page, "Save episode")
        page.wait_for_selector("text=Saved: 11 of 11 steps")
        press(page, "Write the dataset")
        page.wait_for_selector("text=Written: 1 episodes, 11 labels")
        page.close()
    labels = open_store(DataConfig(path=str(root / "out/labeled"), resolution=32))
    assert flagged_rows(labels, "labeled").sum() == 11


def test_two_users_do_not_mix_and_a_broken_file_is_a_sentence(visit, root):
    (root / "broken.mp4").write_bytes(b"no video" * 99)
    write_video(root / "mine.mp4", np.zeros((12, 32, 32, 3), np.uint8), 10)
    first, second = visit(), visit()
    second.get_by_label("Episode, 0 to 2").fill("2")
    press(second, "Open episode")
    second.wait_for_selector("text=2, 15 frames")
    first.locator("input[type=file]").set_input_files(root / "broken.mp4")
    first.wait_for_selector(".st-warn >> text=broken.mp4 cannot be read")
    first.locator("input[type=file]").set_input_files(root / "mine.mp4")
    first.wait_for_selector("text=mine.mp4, 12 frames")
    for page, steps in ((first, 11), (second, 14)):
        tab(page, "Edit")
        page.wait_for_selector(f"text=version 1 of 1, {steps} steps")
    press(first, "Apply")
    first.wait_for_selector("text=version 2 of 2, 11 steps")
    assert second.locator("text=version 1 of 1, 14 steps").is_visible()


def test_the_exported_page_drives_as_the_model_does(browser, blocks, tmp_path):
    """With the published networks, which have most kinds of operations."""
    lam, codes = tmp_path / "lam", FsqConfig(positions=1, levels=(3, 3))
    save_lam(lam, LapoConfig(size=32, idm_scale=1, fdm_base=4, bottleneck=codes))
    file = studio.run(StudioConfig(run=str(lam), data=str(blocks), export=str(tmp_path / "site")))["path"]
    requests = []
    page = browser.new_page()
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: requests.append(str(error)))
    page.goto(file.as_uri())
    page.wait_for_selector("#look canvas.st-frame")
    tab(page, "What does it mean?")
    assert page.locator(".st-group").first.is_visible()
    tab(page, "Drive")
    for _ in range(3):
        page.keyboard.press("1")
    assert page.locator("#drive .st-facts").inner_text().startswith("3 steps")
    shown = np.array(page.evaluate("latentactDrive.frame")).reshape(3, 32, 32)
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [file.as_uri()]
    page.close()

    text = re.search(r'<script id="data" type="application/json">(.*?)</script>', file.read_text(), re.DOTALL)
    drive = json.loads(text.group(1))["drive"]
    scene = np.frombuffer(base64.b64decode(drive["scenes"][0]), np.uint8).reshape(3, 32, 32)
    model = load_lam(lam)
    past = [torch.tensor(scene)] * (model.context + 1)
    for _ in range(3):
        vectors = torch.tensor([drive["controls"][0]["vectors"]])
        with torch.no_grad():
            past = [*past[1:], model.predict(torch.stack(past)[None], vectors)[0]]
    assert np.abs(shown - past[-1].numpy()).max() <= 2  # weights of 16 bits
