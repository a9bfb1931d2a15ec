// Lists the models of a Darkroom server and where each is, loads or unloads one, or pins it in
// memory, using only the .proto files. All but the list are for admins: with a token whose entry
// says so, in DARKROOM_TOKEN, or without tokens from the server's own machine.
//
//   npm ci
//   node models.js [HOST:PORT]
//   node models.js HOST:PORT load|unload|pin|unpin NAME

import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [target = process.env.DARKROOM_TARGET ?? "127.0.0.1:50051", verb = "list", name] =
  process.argv.slice(2);

const definition = protoLoader.loadSync("darkroom/v1/model.proto", {
  includeDirs: [fileURLToPath(new URL("../../protos", import.meta.url))],
  keepCase: true,
  enums: String,
  longs: Number,
  defaults: true,
});
const { ModelService } = grpc.loadPackageDefinition(definition).darkroom.v1;
const client = new ModelService(target, grpc.credentials.createInsecure());
const metadata = new grpc.Metadata();
if (process.env.DARKROOM_TOKEN) {
  metadata.set("authorization", `Bearer ${process.env.DARKROOM_TOKEN}`);
}

const verbs = { list, load, unload, pin: () => pin(true), unpin: () => pin(false) };

async function list() {
  const { models } = await promisify(client.ListModels.bind(client))({}, metadata);
  models.forEach(show);
}

// Returns once the model is in memory. Without a deadline it waits as long as the load takes.
async function load() {
  const { model } = await promisify(client.LoadModel.bind(client))({ model: name }, metadata);
  show(model);
}

async function unload() {
  const { unfinished_jobs: jobs } = await promisify(client.UnloadModel.bind(client))(
    { model: name },
    metadata,
  );
  console.log(`${name}: unloaded; unfinished jobs that use it: ${jobs}`);
}

async function pin(pinned) {
  const { model } = await promisify(client.PinModel.bind(client))(
    { model: name, pinned },
    metadata,
  );
  show(model);
}

function show(model) {
  const parts = [stateOf(model)];
  if (model.pinned) parts.push("pinned");
  if (model.files_changed) parts.push("files changed: load it to read them again");
  if (model.weight_bytes) parts.push(`${(model.weight_bytes / 2 ** 30).toFixed(2)} GiB`);
  if (model.last_used) {
    parts.push(`last used ${new Date(model.last_used.seconds * 1000).toISOString()}`);
  }
  console.log(`${model.id}: ${parts.join(", ")}`);
}

// A server older than the state sends none: all its models are in memory once they are ready.
function stateOf({ state, state_reason: reason, ready, load: progress }) {
  switch (state) {
    case "MODEL_STATE_UNSPECIFIED":
      return ready ? "resident" : "loading";
    case "MODEL_STATE_FAILED":
      return `failed (${reason})`;
    case "MODEL_STATE_LOADING":
      return progress?.fetch_bytes
        ? `loading (${Math.floor((100 * progress.fetched_bytes) / progress.fetch_bytes)} % fetched)`
        : "loading";
    default:
      return state.replace("MODEL_STATE_", "").toLowerCase();
  }
}

try {
  if (!verbs[verb] || (verb !== "list" && !name)) {
    console.error("usage: node models.js [HOST:PORT [load|unload|pin|unpin NAME]]");
    process.exitCode = 2;
  } else {
    await verbs[verb]();
  }
} catch (error) {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
} finally {
  client.close();
}
