// The page to try prompts. It calls the public API only, and keeps the token in memory.

const $ = (id) => document.getElementById(id);
const api = (path) => new URL(path, location.origin);

const MAX_RESULTS = 12;
const STATUS_SECONDS = 2;
const BUSY_STATUS_SECONDS = 0.5;
const RETRIES = 8;
const LONGEST_RETRY_SECONDS = 10;

// Inputs of the form by field of the API.
const NUMBERS = ["width", "height", "steps", "guidance_scale", "strength"];
const IMAGE_TASKS = ["image_to_image", "inpaint", "edit"];
const TEXTS = ["prompt", "negative_prompt"];

const models = new Map();
const results = [];
let token = "";
let running = null; // The AbortController of the request that is under way.
let shown = null; // The result that is displayed.

class ApiError extends Error {
  constructor(status, error, retryAfter) {
    super(error.message ?? `the server answered ${status}`);
    this.status = status;
    this.violations = error.violations ?? [];
    this.retryAfter = retryAfter;
  }
}

// ---- the API ----

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (token) headers.Authorization = `Bearer ${token}`;
  const reply = await fetch(api(path), { ...options, headers });
  if (reply.ok) return reply;
  const body = await reply.json().catch(() => ({}));
  const again = reply.headers.get("x-should-retry") === "true";
  const after = again ? Number(reply.headers.get("retry-after")) : null;
  throw new ApiError(reply.status, body.error ?? {}, after);
}

// Numbers of 16 digits and more lose their last ones in JavaScript.
const parse = (text) => JSON.parse(text.replace(/"seed":(\d{16,})/g, '"seed":"$1"'));

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield parse(data.slice(6));
    }
  }
}

// The seed is spliced in as text, so that all of its digits are sent.
const bodyOf = (fields, seed) => `${JSON.stringify(fields).slice(0, -1)},"seed":${seed}}`;

function randomText(bytes) {
  const values = crypto.getRandomValues(new Uint8Array(bytes));
  return Array.from(values, (value) => value.toString(16).padStart(2, "0")).join("");
}

const randomSeed = () => String(parseInt(randomText(6), 16));

// ---- the form ----

async function loadModels() {
  const { data } = await (await call("/v1/models")).json();
  const select = $("model");
  const chosen = select.value;
  select.replaceChildren();
  models.clear();
  for (const model of data) {
    models.set(model.id, model);
    const option = new Option(model.ready ? model.id : `${model.id} (loading)`, model.id);
    select.add(option);
  }
  if (models.has(chosen)) select.value = chosen;
  showModel();
  if (data.some((model) => !model.ready)) setTimeout(() => loadModels().catch(showError), 2000);
}

function showModel() {
  const model = models.get($("model").value);
  if (!model?.ready) return;
  for (const row of document.querySelectorAll("[data-option]")) {
    row.hidden = !model.optional_fields.includes(row.dataset.option);
  }
  $("loras").placeholder = model.loras.join(", ");
  $("picture-input").hidden = !IMAGE_TASKS.some((task) => model.tasks.includes(task));
  const strength = hasMask() ? model.defaults.inpaint_strength : model.defaults.strength;
  const defaults = { ...model.defaults, strength };
  for (const name of NUMBERS) $(name).placeholder = String(defaults[name] ?? "");
  for (const name of ["width", "height"]) {
    if ($("image").files.length) $(name).placeholder = "as the image";
    $(name).min = model.limits.min_size;
    $(name).max = model.limits.max_size;
    $(name).step = model.limits.size_multiple;
  }
  const scheduler = model.schedulers.find((each) => each.name === model.defaults.scheduler);
  $("steps").min = scheduler?.min_steps ?? 1;
  $("steps").max = scheduler?.max_steps ?? "";
  $("guidance_scale").max = model.limits.max_guidance_scale;
}

function readForm() {
  const fields = { model: $("model").value };
  const visible = (name) => !$(name).closest("[hidden]");
  for (const name of TEXTS) {
    if ($(name).value && visible(name)) fields[name] = $(name).value;
  }
  for (const name of NUMBERS) {
    if ($(name).value !== "" && visible(name)) fields[name] = Number($(name).value);
  }
  if ($("loras").value.trim() && visible("loras")) fields.loras = readLoras($("loras").value);
  return fields;
}

const readLoras = (text) =>
  text.split(",").map((part) => {
    const [id, scale] = part.split(":").map((each) => each.trim());
    return scale ? { id, scale: Number(scale) } : { id };
  });

// The image to start from and its mask, null without an image.
async function readPictures() {
  const [image] = $("image").files;
  if (!image || $("picture-input").hidden) return null;
  const [file] = $("mask").files;
  return { image, mask: file ?? (marked ? await markedMask() : null) };
}

// ---- the mask ----

const hasMask = () => marked || $("mask").files.length > 0;

let marked = false;
let stroke = [0, 0]; // The last place of the pointer, in pixels of the image.

async function showOriginal() {
  clearErrors();
  const [image] = $("image").files;
  URL.revokeObjectURL($("original").src);
  $("original").removeAttribute("src");
  if (image) {
    $("original").src = URL.createObjectURL(image);
    try {
      await $("original").decode();
    } catch {
      $("image").value = "";
      showError({ violations: [{ field: "image", description: "must be a PNG, JPEG or WebP" }] });
    }
  }
  const { naturalWidth, naturalHeight } = $("original");
  [$("canvas").width, $("canvas").height] = [naturalWidth, naturalHeight];
  marked = false;
  $("image-options").hidden = !naturalWidth;
  showModel();
}

// Start from the displayed image.
async function editShown() {
  const { event } = shown;
  const bytes = Uint8Array.from(atob(event.b64_json), (each) => each.charCodeAt(0));
  const files = new DataTransfer();
  files.items.add(new File([bytes], $("download").download, { type: `image/${event.output_format}` }));
  $("image").files = files.files;
  $("picture-input").open = true;
  await showOriginal();
  $("image").focus();
}

function clearMask() {
  $("mask").value = "";
  $("canvas").width = $("original").naturalWidth; // Clears it.
  marked = false;
  showModel();
}

// A stroke goes on from the previous place of the pointer, which may be far away.
function mark(event) {
  if (!(event.buttons & 1)) return;
  const canvas = $("canvas");
  const box = canvas.getBoundingClientRect();
  const place = [
    ((event.clientX - box.left) / box.width) * canvas.width,
    ((event.clientY - box.top) / box.height) * canvas.height,
  ];
  if (event.type === "pointerdown") {
    canvas.setPointerCapture(event.pointerId);
    stroke = place;
    marked = true;
    showModel();
  }
  const context = canvas.getContext("2d");
  context.strokeStyle = "#ff3b1f";
  context.lineCap = "round";
  context.lineWidth = (canvas.width * Number($("brush").value)) / 50;
  context.beginPath();
  context.moveTo(...stroke);
  context.lineTo(...place);
  context.stroke();
  stroke = place;
}

// White where the canvas is marked, black elsewhere.
function markedMask() {
  const { width, height } = $("canvas");
  const mask = Object.assign(document.createElement("canvas"), { width, height });
  const context = mask.getContext("2d");
  context.drawImage($("canvas"), 0, 0);
  context.globalCompositeOperation = "source-in";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.globalCompositeOperation = "destination-over";
  context.fillStyle = "#000";
  context.fillRect(0, 0, width, height);
  return new Promise((resolve) => mask.toBlob(resolve, "image/png"));
}

function clearErrors() {
  $("errors").replaceChildren();
  for (const field of document.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
}

function showError(error) {
  clearErrors();
  if (error.status === 401) askForToken();
  const list = document.createElement("ul");
  for (const { field, description } of error.violations ?? []) {
    const item = document.createElement("li");
    item.textContent = `${field}: ${description}`;
    list.append(item);
    const input = $(field);
    if (input) {
      item.id = `wrong-${field}`;
      input.setAttribute("aria-invalid", "true");
      input.setAttribute("aria-describedby", item.id);
    }
  }
  if (list.childElementCount) {
    $("errors").append(list);
    document.querySelector("[aria-invalid]")?.focus();
    return;
  }
  const line = document.createElement("p");
  line.textContent = error.message;
  $("errors").append(line);
}

function askForToken() {
  $("token-row").hidden = false;
  $("token").setAttribute("aria-invalid", "true");
  $("token").focus();
}

// ---- one request ----

// `pictures` may be a promise: the page is busy from now on.
async function generate(fields, seed, pictures) {
  if (running) return;
  clearErrors();
  running = new AbortController();
  setBusy(true);
  try {
    await follow({ fields, seed, pictures: await pictures }, running.signal);
  } catch (error) {
    hideProgress(error.name === "AbortError" ? "Cancelled" : "");
    if (error.name !== "AbortError") showError(error);
  } finally {
    running = null;
    setBusy(false);
    refreshStrip();
  }
}

// Sends the request, and sends it again with the same key if the server is away for a while.
async function follow(request, signal) {
  const key = randomText(16);
  for (let attempt = 1; ; attempt++) {
    try {
      await stream(request, key, signal);
      return;
    } catch (error) {
      const lost = error instanceof TypeError || error.retryAfter != null;
      if (signal.aborted || !lost || attempt > RETRIES) throw error;
      const seconds = Math.min(error.retryAfter ?? attempt, LONGEST_RETRY_SECONDS);
      say(`${error.retryAfter == null ? "Connection lost" : error.message}. Trying again …`);
      await wait(seconds, signal);
    }
  }
}

function formOf(fields, seed, { image, mask }) {
  const form = new FormData();
  for (const [name, value] of Object.entries({ ...fields, seed })) {
    form.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
  }
  form.append("image", image);
  if (mask) form.append("mask", mask, "mask.png");
  return form;
}

async function stream({ fields, seed, pictures }, key, signal) {
  const model = models.get(fields.model);
  const steps = fields.steps ?? model?.defaults?.steps ?? 20;
  const previews = model?.optional_fields?.includes("preview") ? steps : 0;
  const extra = { stream: true, progress: true, partial_images: previews };
  const all = { ...fields, ...extra };
  const json = { "Content-Type": "application/json" };
  const reply = await call(pictures ? "/v1/images/edits" : "/v1/images/generations", {
    method: "POST",
    headers: { "Idempotency-Key": key, ...(pictures ? {} : json) },
    body: pictures ? formOf(all, seed, pictures) : bodyOf(all, seed),
    signal,
  });
  const began = performance.now();
  let finished = null;
  for await (const event of events(reply)) {
    switch (event.type) {
      case "darkroom.accepted":
        say(event.queue_position ? place(event.queue_position) : "Accepted");
        break;
      case "darkroom.queued":
        say(place(event.position));
        break;
      case "darkroom.started":
        say("Generating");
        break;
      case "darkroom.restarted":
        say("The engine was restarted; generating again");
        break;
      case "darkroom.progress":
        showProgress(event);
        break;
      case "image_generation.partial_image":
      case "image_edit.partial_image":
        showPicture(dataUrl(event), `Preview after step ${event.step}`);
        break;
      case "image_generation.completed":
      case "image_edit.completed":
        finished = event;
        break;
      case "darkroom.finished":
        finish(finished, { fields, seed, pictures, darkroom: event, seconds: since(began) });
        return;
      case "error":
        throw new ApiError(500, event.error, null);
    }
  }
  throw new TypeError("the stream ended early");
}

const since = (began) => (performance.now() - began) / 1000;
const dataUrl = (event) => `data:image/${event.output_format};base64,${event.b64_json}`;
const place = (position) =>
  position === 0 ? "Next in the queue" : `In the queue, behind ${position} other${position > 1 ? "s" : ""}`;

function wait(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("cancelled", "AbortError"));
    });
  });
}

// ---- what is displayed ----

function setBusy(busy) {
  $("generate").disabled = busy;
  $("cancel").hidden = !busy;
  for (const id of ["again", "variation"]) $(id).disabled = busy;
  $("output").setAttribute("aria-busy", String(busy));
  if (busy) {
    $("result").hidden = true;
    say("Sending");
    refreshStrip();
    if (matchMedia("(max-width: 48rem)").matches) $("output").scrollIntoView();
  }
}

const say = (text) => {
  if ($("status").textContent !== text) $("status").textContent = text;
};

function showProgress({ step, steps, rows }) {
  $("progress").hidden = false;
  $("progress").max = steps;
  $("progress").value = step;
  say(`Step ${step} of ${steps}, in a batch of ${rows} row${rows === 1 ? "" : "s"}`);
}

function hideProgress(text) {
  $("progress").hidden = true;
  say(text);
}

function showPicture(url, text) {
  $("picture").src = url;
  $("picture").alt = text;
  $("picture").hidden = false;
  $("empty").hidden = true;
}

function finish(event, request) {
  const result = { ...request, event, url: event.b64_json && dataUrl(event) };
  results.unshift(result);
  results.length = Math.min(results.length, MAX_RESULTS);
  showResult(result);
  showResults();
}

function showResult(result) {
  const { event, fields, seed, darkroom, seconds } = result;
  shown = result;
  hideProgress(event.flagged ? "Withheld by the safety checker" : `Done in ${seconds.toFixed(1)} s`);
  if (result.url) {
    showPicture(result.url, fields.prompt);
    $("download").href = result.url;
    $("download").download = `darkroom-${seed}.${event.output_format}`;
  }
  $("download").hidden = !result.url;
  $("edit").hidden = !result.url || $("picture-input").hidden;
  const facts = {
    Seed: seed,
    Size: event.size.replace("x", " × "),
    Steps: event.record.request.steps,
    Scheduler: event.record.request.scheduler,
    Model: `${darkroom.model} (${darkroom.model_revision.slice(0, 12)})`,
  };
  $("facts").replaceChildren(
    ...Object.entries(facts).flatMap(([name, value]) => {
      const [term, detail] = [document.createElement("dt"), document.createElement("dd")];
      [term.textContent, detail.textContent] = [name, String(value)];
      return [term, detail];
    }),
  );
  $("record").textContent = JSON.stringify(event.record, null, 2);
  $("result").hidden = false;
}

function showResults() {
  $("history").hidden = false;
  $("results").replaceChildren(
    ...results.filter((each) => each.url).map((result) => {
      const [item, button, image] = ["li", "button", "img"].map((name) => document.createElement(name));
      button.type = "button";
      button.setAttribute("aria-label", `Show: ${result.fields.prompt}, seed ${result.seed}`);
      button.addEventListener("click", () => !running && showResult(result));
      image.src = result.url;
      image.alt = "";
      button.append(image);
      item.append(button);
      return item;
    }),
  );
}

// ---- copies ----

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// The files of a form are named as the reader will have saved them.
function asForm({ fields, seed, pictures }) {
  const lines = [`curl ${api("/v1/images/edits")}`];
  if (token) lines.push('-H "Authorization: Bearer $DARKROOM_TOKEN"');
  for (const [name, value] of Object.entries({ ...fields, seed })) {
    const text = typeof value === "object" ? JSON.stringify(value) : String(value);
    lines.push(`--form-string ${quoted(`${name}=${text}`)}`);
  }
  lines.push(`-F ${quoted(`image=@${pictures.image.name}`)}`);
  if (pictures.mask) lines.push("-F 'mask=@mask.png'");
  return lines.join(" \\\n  ");
}

function asCurl({ fields, seed, pictures }) {
  if (pictures) return asForm({ fields, seed, pictures });
  const lines = [`curl ${api("/v1/images/generations")}`, "-H 'Content-Type: application/json'"];
  if (token) lines.push('-H "Authorization: Bearer $DARKROOM_TOKEN"');
  lines.push(`-d ${quoted(bodyOf(fields, seed))}`);
  return lines.join(" \\\n  ");
}

function asPython({ fields, seed, pictures }) {
  const { prompt, model, ...others } = fields;
  // JSON texts and numbers are Python ones too.
  const extra = [...Object.entries(others).map(([k, v]) => `"${k}": ${JSON.stringify(v)}`), `"seed": ${seed}`];
  const key = token ? 'os.environ["DARKROOM_TOKEN"]' : '"unused"';
  return [
    "import base64",
    ...(token ? ["import os"] : []),
    "from pathlib import Path",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${api("/v1")}", api_key=${key})`,
    `images = client.images.${pictures ? "edit" : "generate"}(`,
    ...(pictures ? [`    image=Path(${JSON.stringify(pictures.image.name)}),`] : []),
    ...(pictures?.mask ? ['    mask=Path("mask.png"),'] : []),
    `    model=${JSON.stringify(model)},`,
    `    prompt=${JSON.stringify(prompt)},`,
    `    extra_body={${extra.join(", ")}},`,
    ")",
    `Path("image.png").write_bytes(base64.b64decode(images.data[0].b64_json))`,
    "",
  ].join("\n");
}

async function copy(text, button) {
  // The clipboard's own interface is for HTTPS and loopback only.
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
  } else {
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  say("Copied");
}

// ---- the strip ----

const gigabytes = (bytes) => `${(bytes / 2 ** 30).toFixed(1)} GiB`;
let stripTimer = 0;
let mayReadStatus = true;

async function refreshStrip() {
  clearTimeout(stripTimer);
  try {
    if (mayReadStatus) showStatus(await (await call("/v1/status")).json());
    else showState((await (await fetch(api("/ready"))).json()).state);
  } catch (error) {
    if (error.status === 401 || error.status === 403) mayReadStatus = false;
    else showState("not reachable");
  }
  if (!document.hidden) stripTimer = setTimeout(refreshStrip, 1000 * (running ? BUSY_STATUS_SECONDS : STATUS_SECONDS));
}

const showState = (state) => ($("state").textContent = state);

function showStatus(status) {
  showState(status.state);
  $("running").textContent = status.running_jobs;
  $("queue").textContent = `${status.queued_jobs} of ${status.max_queued_jobs}`;
  const rows = status.engines.reduce((sum, engine) => sum + engine.rows_in_use, 0);
  const most = Math.max(1, ...status.models.map((model) => model.max_rows)) * status.engines.length;
  $("rows").textContent = `${rows} of ${most} rows`;
  $("meter").firstElementChild.style.width = `${Math.min(100, (100 * rows) / most)}%`;
  const bytes = (kind) =>
    status.engines.reduce((sum, engine) => sum + (engine.memory_bytes[kind] ?? 0), 0);
  const total = bytes("device_total");
  $("memory").textContent = total ? `${gigabytes(bytes("reserved"))} of ${gigabytes(total)}` : "–";
}

// ---- events of the page ----

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim() || token;
  const seed = $("seed").value || randomSeed();
  generate(readForm(), seed, readPictures());
});

$("image").addEventListener("change", showOriginal);
$("mask").addEventListener("change", showModel);
$("clear-mask").addEventListener("click", clearMask);
$("remove-image").addEventListener("click", () => {
  $("image").value = $("mask").value = "";
  showOriginal();
});
for (const kind of ["pointerdown", "pointermove"]) $("canvas").addEventListener(kind, mark);

$("token").addEventListener("change", () => {
  token = $("token").value.trim();
  mayReadStatus = true;
  clearErrors();
  loadModels().catch(showError);
  refreshStrip();
});

$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});

$("model").addEventListener("change", showModel);
$("cancel").addEventListener("click", () => running?.abort());
$("again").addEventListener("click", () => generate(shown.fields, shown.seed, shown.pictures));
$("variation").addEventListener("click", () => {
  generate(shown.fields, String((BigInt(shown.seed) + 1n) % 2n ** 63n), shown.pictures);
});
$("edit").addEventListener("click", editShown);
$("copy-curl").addEventListener("click", (event) => copy(asCurl(shown), event.target));
$("copy-python").addEventListener("click", (event) => copy(asPython(shown), event.target));
document.addEventListener("visibilitychange", refreshStrip);

loadModels().catch(showError);
refreshStrip();
