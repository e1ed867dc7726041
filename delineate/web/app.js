// The page: start exports and watch them, the newest over SSE, the others and whatever SSE does not reach by polling.

const POLL_MS = 2000;
const MAX_STREAMS = 2; // a browser opens six connections to a host, for all tabs together; streams must not eat them up
const MAX_FILES = 1000;
const FINAL = new Set(["completed", "failed", "cancelled"]);
const $ = (id) => document.getElementById(id);
const rows = new Map(); // jobId -> {row, job, source, polled}
let timer = 0;
let unsent = {}; // the last request and its Idempotency-Key, so that sending it once more makes no second export

async function call(method, path, body, key) {
  const headers = body ? { "Content-Type": "application/json", "Idempotency-Key": key } : {};
  const answer = await fetch(path, { method, headers, body }).catch(() => {
    throw new Error("The service cannot be reached. Try again in a moment.");
  });
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    throw Object.assign(new Error(content.message ?? `The service answered ${answer.status}.`), { status: answer.status });
  }
  return content;
}

const files = (count) => `${count.toLocaleString("en")} ${count === 1 ? "file" : "files"}`;

function bytes(count) {
  const units = ["B", "KB", "MB", "GB"];
  const step = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(count || 1) / 3)));
  return `${(count / 1000 ** step).toFixed(step ? 1 : 0)} ${units[step]}`;
}

function facts(job) {
  const start = new Date(job.createdAt ?? Date.now());
  const today = start.toDateString() === new Date().toDateString();
  const time = start.toLocaleString([], { dateStyle: today ? undefined : "medium", timeStyle: "short" });
  const packed = job.bytesTotal ? `${bytes(job.bytesDone)} of ${bytes(job.bytesTotal)}` : "";
  return [FINAL.has(job.status) ? job.size !== undefined && bytes(job.size) : packed, time].filter(Boolean).join(" · ");
}

function message(job) {
  const text = (job.error?.message ?? job.message ?? "Waiting for a worker")
    .replace('ask with "on_missing": "skip"', "tick “Skip files that do not exist”");
  const skipped = job.skippedFiles ?? [];
  if (!skipped.length) return text;
  const more = skipped.length > 10 ? ` and ${skipped.length - 10} more` : "";
  return `${text}, without ${files(skipped.length)} that ${skipped.length === 1 ? "does" : "do"} not exist: ${
    skipped.slice(0, 10).join(", ")}${more}`;
}

function entry(jobId, onTop) {
  const known = rows.get(jobId);
  if (known) return known;
  const row = $("job").content.cloneNode(true).firstElementChild;
  const made = { row, job: {}, source: null, polled: false };
  row.querySelector(".download").href = `/v1/export/${jobId}/download?redirect=1`;
  row.querySelector(".download").onclick = (event) => download(event, jobId);
  row.querySelector(".cancel").onclick = () => act("DELETE", `/v1/export/${jobId}`, jobId);
  row.querySelector(".retry").onclick = () => act("POST", `/v1/export/${jobId}/retry`, jobId);
  onTop ? $("jobs").prepend(row) : $("jobs").append(row);
  $("none").hidden = true;
  rows.set(jobId, made);
  return made;
}

function show(news, onTop = true) {
  const made = entry(news.jobId, onTop);
  const { row } = made;
  const before = made.job.status;
  const job = (made.job = { createdAt: made.job.createdAt, ...news }); // progress events do not repeat createdAt
  const name = `${files(job.totalFiles)}, export ${job.jobId.slice(0, 8)}`;
  const part = (kind) => row.querySelector(`.${kind}`);
  row.dataset.status = job.status;
  part("title").textContent = files(job.totalFiles);
  part("facts").textContent = facts(job);
  part("status").textContent = job.status;
  part("message").textContent = message(job);
  const progress = row.querySelector("progress");
  progress.value = job.progress ?? 0;
  progress.hidden = FINAL.has(job.status);
  progress.ariaLabel = `Progress of ${name}`;
  const actions = {
    download: job.status === "completed",
    cancel: !FINAL.has(job.status),
    retry: job.status === "failed" || job.status === "cancelled",
  };
  const focused = document.activeElement; // asked now: it may have moved once it is hidden
  for (const [kind, possible] of Object.entries(actions)) {
    part(kind).hidden = !possible;
    part(kind).ariaLabel = `${part(kind).textContent}, ${name}`;
  }
  if (row.contains(focused) && focused.hidden) row.querySelector("a:not([hidden]), button:not([hidden])").focus();
  if (before && before !== job.status) $("news").textContent = `${name}: ${job.status}`;
}

const report = (jobId, error) => { rows.get(jobId).row.querySelector(".message").textContent = error.message; };

async function act(method, path, jobId) {
  try {
    show(await call(method, path));
  } catch (error) {
    report(jobId, error);
  }
  watch();
}

// Ask for the link first: a refusal then shows up here instead of replacing the page.
async function download(event, jobId) {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  try {
    location.assign((await call("GET", `/v1/export/${jobId}/download`)).downloadUrl);
  } catch (error) {
    report(jobId, error);
  }
}

function close(made) {
  made.source?.close();
  made.source = null;
}

// Bring streams and polling in line with what is unfinished, newest first; a page nobody sees holds no connection.
function watch() {
  const open = [...rows.values()].filter((made) => !FINAL.has(made.job.status));
  open.sort((a, b) => (b.job.createdAt ?? "").localeCompare(a.job.createdAt ?? ""));
  const streamed = new Set(document.hidden ? [] : open.filter((made) => !made.polled).slice(0, MAX_STREAMS));
  for (const made of rows.values()) if (!streamed.has(made)) close(made);
  for (const made of streamed) made.source ??= stream(made);
  clearTimeout(timer);
  if (!document.hidden && open.length > streamed.size) timer = setTimeout(poll, POLL_MS);
}

function stream(made) {
  const source = new EventSource(`/v1/export/${made.job.jobId}/progress`);
  const update = (event) => {
    show(JSON.parse(event.data));
    if (FINAL.has(made.job.status)) watch();
  };
  for (const name of ["progress", ...FINAL]) source.addEventListener(name, update);
  source.onerror = () => {
    // CONNECTING: the browser comes back by itself. CLOSED: it does not (a 503, a proxy without streams), so poll.
    if (source.readyState !== EventSource.CLOSED || made.source !== source) return;
    made.polled = true;
    watch();
  };
  return source;
}

// One request for all: one for each would soon be more than the rate limit allows.
async function poll() {
  const waiting = [...rows.values()].filter((made) => !made.source && !FINAL.has(made.job.status));
  if (!waiting.length) return watch();
  const { jobs } = await call("GET", "/v1/exports?limit=100").catch(() => ({ jobs: null }));
  for (const made of jobs ? waiting : []) {
    if (made.source || FINAL.has(made.job.status)) continue; // it went on while we asked
    const { jobId } = made.job;
    const listed = jobs.find((job) => job.jobId === jobId);
    try {
      show(listed ?? (await call("GET", `/v1/export/${jobId}`)));
    } catch (error) {
      report(jobId, error);
      if (error.status === 404) made.job.status = "failed"; // forgotten by the service; nothing will come any more
    }
  }
  watch();
}

function problemWith(words, ids) {
  const wrong = words.find((word) => !/^\d{5,9}$/.test(word) || word < 10_000 || word > 100_000_000);
  if (wrong) return `“${wrong}” is not a file id; those are numbers from 10,000 to 100,000,000.`;
  if (!ids.length) return "Name at least one file.";
  if (ids.length > MAX_FILES) return `${files(ids.length)} are too many for one export; ${files(MAX_FILES)} are possible.`;
  return "";
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (event.target.ariaBusy === "true") return;
  const words = $("ids").value.split(/[\s,;]+/).filter(Boolean);
  const ids = [...new Set(words.map(Number))];
  const problem = problemWith(words, ids);
  $("problem").textContent = problem;
  $("ids").ariaInvalid = String(Boolean(problem));
  if (problem) return $("ids").focus();
  const body = JSON.stringify({ file_ids: ids, on_missing: $("skip").checked ? "skip" : "fail" });
  if (unsent.body !== body) unsent = { body, key: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}` };
  event.target.ariaBusy = "true";
  try {
    show(await call("POST", "/v1/export", body, unsent.key));
    unsent = {};
    $("news").textContent = `Export of ${files(ids.length)} started`;
    watch();
  } catch (error) {
    $("problem").textContent = error.message;
  } finally {
    event.target.ariaBusy = "false";
  }
});

document.addEventListener("visibilitychange", () => (document.hidden ? watch() : poll()));

call("GET", "/v1/exports?limit=20").then(({ jobs }) => {
  for (const job of jobs) if (!rows.has(job.jobId)) show(job, false);
  watch();
}).catch(() => {}) // the list is a convenience; the form works without it
  .finally(() => { $("none").hidden = rows.size > 0; });
