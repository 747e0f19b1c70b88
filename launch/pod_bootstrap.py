"""What runs first on each machine of a launched job: arms the switch, runs the job, hands back its small files.

Standard library only, Python 3.8 or later: it starts before anything is installed. It comes with the job in
LOADMASTER_JOB (JSON) and the job's files in LOADMASTER_PAYLOAD (tar.gz, base64): on a Pod in its environment
(loadmaster/launch/order.py packs it), on a host by SSH over standard input (loadmaster/launch/ssh.py).

The dead-man's switch of a rented machine is a process of its own, started before all else: at the deadline, or some
minutes after the job has ended without anyone coming for the result, it terminates the Pod, or the cluster that the
Pod belongs to, with the Pod's own key. So a laptop that is closed, a network that is gone or a job that hangs cost
a known sum and not more. On a host it is the connection: when standard input ends, so does the job.

On several nodes (NODE_RANK says which this is) only node 0 follows the progress and hands back files. The others
end well before it does, as it goes on to export: then they wait to be ended with it.

What the launcher reads are lines `::loadmaster {json}`; every other line is the job's own output.
"""

import base64
import contextlib
import glob
import hashlib
import io
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.request

MARK = "::loadmaster "
PART_CHARACTERS = 3000
LARGEST_FILE_BYTES = 2 << 20
LARGEST_TOTAL_BYTES = 16 << 20
POLL_S = 5.0
LINGER_S = 2.0
STOPPED = 75
SHORTEST_SECRET = 8
BEGAN = time.monotonic()


def node():
    return int(os.environ.get("NODE_RANK") or 0)


def say(event, **values):
    write(MARK + json.dumps(dict(event=event, **values)))


def write(line):
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except OSError:  # nobody takes the log any more: the job and the switch must go on all the same
        pass


# ------------------------------------------------------------- the switch


def ask(method, url):
    """JSON, or None for no content. Raises OSError (urllib's HTTPError is one)."""
    key = os.environ["RUNPOD_API_KEY"]
    request = urllib.request.Request(
        url, method=method, headers={"Authorization": "Bearer " + key, "User-Agent": "loadmaster"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read() or b"null")


def terminate(job):
    """End this very Pod, or its cluster, whose members end together. True when the provider says that it is done.

    A 404 is a failure like others: whoever can ask is there, so the provider means that this key may not see it.
    """
    try:
        path = "/pods/" + os.environ["RUNPOD_POD_ID"]
        if job["ends"] == "cluster":
            path = "/clusters/" + ask("GET", job["api"] + path)["cluster"]["id"]
        ask("DELETE", job["api"] + path)
        return True
    except urllib.error.HTTPError as error:
        said = f"the provider answered {error.code}"
    except Exception as error:  # whatever a broken answer raises, the switch goes on
        said = type(error).__name__
    say("switch", said=said)
    try:  # the provider's own tool lies in every Pod
        pod = os.environ.get("RUNPOD_POD_ID", "")
        done = subprocess.run(["runpodctl", "remove", "pod", pod], timeout=60, capture_output=True)
        return done.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def left_s(job):
    """Seconds to its end: the machine's clock may be behind, or be put back, and its hours are not more for that."""
    return min(job["deadline"] - time.time(), job["max_hours"] * 3600 - (time.monotonic() - BEGAN))


def arm(job, parent):
    """Child process: waits for the deadline, or for the end of `parent` and the hold after it, and then asks for the
    end of the machine for as long as it is there, whatever was answered."""
    if os.fork():
        return
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    until = time.monotonic() + left_s(job)
    while time.monotonic() < until:
        time.sleep(min(1.0, max(0.0, until - time.monotonic())))
        if os.getppid() != parent:
            until = min(until, time.monotonic() + job["hold_s"])
            parent = os.getppid()
    wait = POLL_S
    while True:
        terminate(job)
        time.sleep(wait)
        wait = min(300.0, wait * 2)


# ---------------------------------------------------------------- the job


def unpack(folder, packed):
    """Each file appears whole: nodes that share the folder write the same ones at the same time."""
    mine = os.path.join(folder, ".unpacking-" + str(node()))
    os.makedirs(mine, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(mine)
        for name in archive.getnames():
            os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
            os.replace(os.path.join(mine, name), os.path.join(folder, name))
    shutil.rmtree(mine)


def wheel(job):
    """The wheel that came along in the environment, as a file; each node has its own."""
    parts = [os.environ.pop("LOADMASTER_WHEEL_" + str(number)) for number in range(job["wheel"]["parts"])]
    content = lzma.decompress(base64.b64decode("".join(parts)))
    if hashlib.sha256(content).hexdigest() != job["wheel"]["sha256"]:
        raise ValueError("the wheel that came along is damaged")
    folder = os.path.join(job["folder"], "wheel-" + str(node()))
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, job["wheel"]["name"])
    with open(path, "wb") as file:
        file.write(content)
    return path


def environment():
    """An empty one, on the container's disk: beside what an image has, another PyTorch finds libraries that were built
    for the image's own. Without pip in it, which Debian keeps in a package of its own."""
    folder = os.path.join(tempfile.gettempdir(), "loadmaster-environment-" + str(node()))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    os.environ["PATH"] = os.pathsep.join([os.path.join(folder, "bin"), os.environ["PATH"]])
    return os.path.join(folder, "bin", "python3")


def install(python, options, redact):
    """Whether pip did. Its lines go into this log; what it downloads is kept nowhere."""
    # Newer base images keep pip from their own Python; this container is thrown away.
    settings = dict(os.environ, PIP_BREAK_SYSTEM_PACKAGES="1", PIP_NO_CACHE_DIR="1")
    where = [] if python == sys.executable else ["--python", python]
    command = [sys.executable, "-m", "pip", *where, "install", "--no-input", "--quiet", *options]
    pip = subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in pip.stdout:
        write(redact(line.decode("utf-8", "replace").rstrip()))
    return pip.wait() == 0


def prepare(job, redact):
    """Unpack the job's files, install the package that is named or came along, and check the version."""
    unpack(job["folder"], base64.b64decode(os.environ.pop("LOADMASTER_PAYLOAD", "")))
    package, python = wheel(job) if job.get("wheel") else job["package"], sys.executable
    if package:
        if job.get("own_environment"):
            try:
                python = environment()
            except (OSError, subprocess.CalledProcessError) as error:
                return f"{sys.executable} -m venv did not make an environment ({error}); is the disk full?"
        pins = ["--constraint", job["constraints"]] if job.get("constraints") else []
        # First what it requires; then itself again, as pip leaves what an image has under the same version as it is.
        for options in (pins, ["--no-deps", "--force-reinstall"]):
            if not install(python, [*options, package], redact):
                return "pip could not install " + package
    found = subprocess.run([python, "-c", "import loadmaster; print(loadmaster.__version__)"], stdout=subprocess.PIPE)
    version = found.stdout.decode().strip()
    if version != job["version"]:
        has = version or "not at all"
        return f"{python} here has loadmaster {has}, the launcher {job['version']}; {job['remedy']}"
    return None


def run(job, redact):
    """Run the command, its lines into this log; SIGTERM before the deadline, so that it can save a checkpoint."""
    mark = f"LOADMASTER_NODE={job['name']}-{node()}"
    environment = dict(os.environ, **dict([mark.split("=")]))
    for name in ("LOADMASTER_JOB", "LOADMASTER_BOOTSTRAP"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [os.path.expanduser(job["command"][0]), *job["command"][1:]],
        cwd=job["folder"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )

    def stop(*_):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    if job["deadline"] is not None:
        soft = threading.Timer(max(0.0, left_s(job) - job["stop_before_s"]), stop)
        soft.daemon = True
        soft.start()
    ended = threading.Event()
    threads = [threading.Thread(target=clear, args=(process, mark), daemon=True)]
    if node() == 0:
        threads.append(threading.Thread(target=progress, args=(job, ended), daemon=True))
    if job["ends"] == "with-input":
        threading.Thread(target=stop_with_input, args=(job, process, stop), daemon=True).start()
    for thread in threads:
        thread.start()
    for line in process.stdout:
        text = redact(line.decode("utf-8", "replace").rstrip("\r\n"))
        write(" " + text if text.startswith(MARK) else text)
    code = process.wait()
    ended.set()
    for thread in threads:
        thread.join()
    return code if code >= 0 else 128 - code


def clear(process, mark):
    """End what the job leaves behind: workers of a dead parent would hold the GPUs, and this log open."""
    process.wait()
    end = time.time() + LINGER_S
    while left := [pid for pid in map(os.path.basename, glob.glob("/proc/[0-9]*")) if marked(pid, mark)]:
        if time.time() > end:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            return
        time.sleep(0.1)


def marked(pid, mark):
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return mark.encode() in file.read().split(b"\0")
    except OSError:
        return False


def stop_with_input(job, process, stop):
    """The launcher closes our standard input, or is gone: SIGTERM, time for a checkpoint, then the end.

    How many seconds that is may be the last that it said.
    """
    said = sys.stdin.buffer.read().strip()
    stop()
    end = time.time() + (float(said) if said else job["stop_before_s"])
    while process.poll() is None and time.time() < end:
        time.sleep(0.1)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def progress(job, ended):
    """Say the newest line of metrics.jsonl whenever there is one, and once more when the job has ended."""
    path, last, over = os.path.join(job["run_dir"], "metrics.jsonl"), None, False
    while not over:
        over = ended.wait(job["progress_s"])
        try:
            with open(path, "rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - 4096))
                metrics = json.loads(file.read().splitlines()[-1])
        except (OSError, ValueError, IndexError):
            continue
        if metrics != last:
            last = metrics
            say("step", **{k: metrics.get(k) for k in ("step", "steps", "loss", "tokens_per_second")})


def hand_back(job):
    """The run directory's small files as numbered base64 lines, with the hash of the whole."""
    buffer, left, total = io.BytesIO(), [], 0
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for pattern in job["files"]:
            for path in sorted(glob.glob(os.path.join(glob.escape(job["run_dir"]), pattern))):
                if not os.path.isfile(path):
                    continue
                name, size = os.path.relpath(path, job["run_dir"]), os.path.getsize(path)
                if size > LARGEST_FILE_BYTES or total + size > LARGEST_TOTAL_BYTES:
                    left.append(name)
                    continue
                total += size
                archive.add(path, arcname=name)
    data = buffer.getvalue()
    text, digest = base64.b64encode(data).decode(), hashlib.sha256(data).hexdigest()
    parts = [text[i : i + PART_CHARACTERS] for i in range(0, len(text), PART_CHARACTERS)]
    for number, part in enumerate(parts):
        say("file", part=number, data=part)
    return {"parts": len(parts), "sha256": digest, "left": left}


def once(job, redact):
    """Exit code, and what went wrong before the job could start. A job that has ended is not run again."""
    record = os.path.join(job["folder"], f"ended-{node()}.json")
    with contextlib.suppress(OSError, ValueError, TypeError), open(record) as file:  # the container was started again
        code, said = json.load(file)
        over = job["deadline"] is not None and time.time() > job["deadline"] - job["stop_before_s"]
        if code != STOPPED or over:
            return code, said
        os.remove(record)  # stopped by the host, it goes on: what ends the machine now is another end
    said = prepare(job, redact)
    code = 2 if said else run(job, redact)
    with contextlib.suppress(OSError):  # a full disk
        with open(record + ".partial", "w") as file:
            file.write(json.dumps([code, said]))
        os.replace(record + ".partial", record)
    return code, said


def hidden(names):
    """(value, variable) that no line shows, longest first: one of several lines, such as a key's file, line by line."""
    found = []
    for name in names:
        value = os.environ.get(name, "").strip()
        lines = [line.strip() for line in value.splitlines()]
        found += [(line, name) for line in lines if line == value or len(line) >= SHORTEST_SECRET]
    return sorted(found, key=lambda pair: -len(pair[0]))


def main():
    job = json.loads(os.environ["LOADMASTER_JOB"])
    job["run_dir"] = os.path.expanduser(job["run_dir"])
    rented = job["ends"] != "with-input"
    if rented:
        arm(job, os.getpid())
    secrets = hidden([*job["secrets"], "RUNPOD_API_KEY"])

    def redact(text):
        for value, name in secrets:
            text = text.replace(value, "[" + name + "]")
        return text

    say("armed", deadline=job["deadline"])
    nothing = {"parts": 0, "sha256": hashlib.sha256(b"").hexdigest(), "left": []}
    try:
        code, said = once(job, redact)
    except Exception as error:  # whatever it is, the launcher must hear of an end
        code, said = 4, redact(f"the bootstrap failed: {type(error).__name__}: {error}")
    try:
        files = hand_back(job) if node() == 0 else nothing
    except Exception as error:  # nor is this one a reason to say nothing of the end
        files, said = nothing, f"{said or 'the job ended'}; its small files did not come: {error}"
    say("end", exit_code=code, said=said, **files)
    if not rented:
        os._exit(0)  # a thread still reads standard input, and an interpreter that ends by itself waits for its lock
    if job["ends"] == "cluster" and node() > 0 and code == 0:
        time.sleep(max(0.0, left_s(job)))  # node 0 may still be exporting; it ends us all
    time.sleep(job["hold_s"])  # the launcher ends the Pod as soon as it has everything
    while not terminate(job):
        time.sleep(POLL_S)


main()
