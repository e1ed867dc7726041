// The page: start exports, follow each over SSE, and poll where SSE does not get through.
"use strict";

const POLL_MS = 2000;
const FINAL = new Set(["completed", "failed", "cancelled"]);
const list = document.getElementById("jobs");
const rows = new Map(); // jobId -> {row, source, timer}

async function call(method, path, body) {
  const answer = await fetch(path, {
    method,
    headers: body ? { "Content-Type": "application/json", "Idempotency-Key": crypto.randomUUID?.() ?? String(Math.random()) } : {},
    body: body ? JSON.stringify(body) : undefined,
  });
  const document = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(document.message), { status: answer.status });
  return document;
}

function entry(jobId, onTop) {
  const known = rows.get(jobId);
  if (known) return known;
  const row = document.getElementById("job").content.cloneNode(true).firstElementChild;
  const made = { row, source: null, timer: 0 };
  row.querySelector(".download").href = `/v1/export/${jobId}/download?redirect=1`;
  row.querySelector(".cancel").onclick = () => act("DELETE", `/v1/export/${jobId}`, jobId);
  row.querySelector(".retry").onclick = () => act("POST", `/v1/export/${jobId}/retry`, jobId);
  onTop ? list.prepend(row) : list.append(row);
  rows.set(jobId, made);
  return made;
}

async function act(method, path, jobId) {
  try {
    show(await call(method, path));
    follow(jobId);
  } catch (error) {
    rows.get(jobId).row.querySelector(".message").textContent = error.message;
  }
}

function show(job, onTop = true) {
  const { row } = entry(job.jobId, onTop);
  const ended = FINAL.has(job.status);
  row.dataset.status = job.status;
  row.querySelector(".title").textContent = `${job.totalFiles} ${job.totalFiles === 1 ? "file" : "files"}`;
  row.querySelector(".status").textContent = job.status;
  row.querySelector("progress").value = job.progress ?? 0;
  row.querySelector(".message").textContent = job.error ? job.error.message
    : [job.message, ended ? "" : `${job.currentFile ?? 0} of ${job.totalFiles}`].filter(Boolean).join(" · ");
  row.querySelector(".download").hidden = job.status !== "completed";
  row.querySelector(".cancel").hidden = ended;
  row.querySelector(".retry").hidden = job.status !== "failed" && job.status !== "cancelled";
  return ended;
}

function stop(made) {
  made.source?.close();
  made.source = null;
  clearTimeout(made.timer);
}

function follow(jobId) {
  const made = entry(jobId, true);
  stop(made);
  if (!window.EventSource) return poll(jobId);
  const source = (made.source = new EventSource(`/v1/export/${jobId}/progress`));
  const update = (event) => { if (show(JSON.parse(event.data))) stop(made); };
  for (const name of ["progress", "completed", "failed", "cancelled"]) source.addEventListener(name, update);
  source.onerror = () => {
    // CONNECTING: the browser comes back by itself. CLOSED: it does not (a 503, a proxy without streams), so poll.
    if (source.readyState === EventSource.CLOSED && made.source === source) poll(jobId);
  };
}

async function poll(jobId) {
  const made = entry(jobId, true);
  stop(made);
  try {
    if (show(await call("GET", `/v1/export/${jobId}`))) return;
  } catch (error) {
    made.row.querySelector(".message").textContent = error.message;
    if (error.status === 404) return;
  }
  made.timer = setTimeout(() => poll(jobId), POLL_MS);
}

document.getElementById("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const problem = document.getElementById("problem");
  const button = document.getElementById("start");
  const words = document.getElementById("ids").value.split(/[\s,;]+/).filter(Boolean);
  const wrong = words.find((word) => !/^\d{1,15}$/.test(word));
  problem.textContent = wrong ? `“${wrong}” is not a file id.` : "";
  if (wrong) return;
  button.disabled = true;
  try {
    const body = { file_ids: words.map(Number), on_missing: document.getElementById("skip").checked ? "skip" : "fail" };
    const job = await call("POST", "/v1/export", body);
    show(job);
    follow(job.jobId);
  } catch (error) {
    problem.textContent = error.message;
  } finally {
    button.disabled = false;
  }
});

call("GET", "/v1/exports?limit=20").then(({ jobs }) => {
  for (const job of jobs) if (!show(job, false)) follow(job.jobId);
}).catch(() => {}); // the list is a convenience; the form works without it
