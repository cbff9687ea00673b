"""A real headless Chromium, driven over DevTools' pipe: no driver, no port, no package."""

import argparse
import base64
import json
import os
import shutil
import subprocess
import tempfile

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

KEYS = {"Escape": 27}  # what the browser itself answers needs its number


class Browser:
    """`with Browser() as page: page.open(path); page.run("document.title")`. problems: what the console and the policy
    complained of."""

    def __enter__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        here_in, there_out = os.pipe()
        there_in, here_out = os.pipe()
        self.source, self.sink = os.fdopen(here_in, "rb"), os.fdopen(here_out, "wb")

        def fds():  # DevTools reads from 3 and writes to 4
            a, b = os.dup(there_in), os.dup(there_out)
            os.dup2(a, 3)
            os.dup2(b, 4)

        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            [CHROMIUM, *options, f"--user-data-dir={self.profile.name}", "about:blank"],
            preexec_fn=fds,
            close_fds=False,
            stderr=subprocess.DEVNULL,
        )
        os.close(there_in), os.close(there_out)
        self.number, self.session, self.problems, self.requests = 0, None, [], []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self.source.close(), self.sink.close()
        self.profile.cleanup()

    def read(self):
        data = bytearray()
        while (byte := self.source.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("Chromium ended")
            data += byte
        message = json.loads(data)
        if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.problems.append(message["params"])
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message

    def send(self, method, **params):
        """The result of a DevTools command."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.sink.write(json.dumps(message).encode() + b"\0")
        self.sink.flush()
        while (answer := self.read()).get("id") != self.number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, path, width=1280, height=900, scheme="light"):
        """Load a file and wait until it is drawn."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Page.navigate", url=f"file://{path}")
        while self.read().get("method") != "Page.loadEventFired":
            pass

    def run(self, script):
        """The value of a JavaScript expression, awaited."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            text = key if kind == "keyDown" and len(key) == 1 else ""
            self.send("Input.dispatchKeyEvent", type=kind, key=key, text=text, windowsVirtualKeyCode=KEYS.get(key, 0))

    def move(self, x, y):
        """The pointer to a place in the window."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x, y):
        self.move(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path):
        """PNG of what is in sight."""
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A picture of a page.")
    parser.add_argument("page")
    parser.add_argument("png")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--scheme", choices=["light", "dark"], default="light")
    parser.add_argument("--at", metavar="ID", help="scroll to this element")
    args = parser.parse_args()
    with Browser() as browser:
        browser.open(os.path.abspath(args.page), args.width, args.height, args.scheme)
        if args.at:
            browser.run(f"document.getElementById({args.at!r}).scrollIntoView()")
        browser.run("Promise.all([...document.images].map(image => image.decode().catch(() => null))).then(() => 0)")
        browser.screenshot(args.png)
