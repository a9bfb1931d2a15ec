// Lists the LoRA adapters and ControlNets of a Darkroom server, adds an adapter or removes
// one, using only the .proto files. Adding and removing are for admins: with a token whose
// entry says so, in DARKROOM_TOKEN, or without tokens from the server's own machine.
//
//   npm ci
//   node adapters.js [HOST:PORT]
//   node adapters.js HOST:PORT add|remove NAME

import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [target = process.env.DARKROOM_TARGET ?? "127.0.0.1:50051", verb = "list", id] =
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

const verbs = { list, add, remove };

async function list() {
  const { adapters } = await promisify(client.ListAdapters.bind(client))({}, metadata);
  adapters.forEach(show);
  if (!adapters.length) console.log("no adapters: start the server with --lora or --controlnet");
}

async function add() {
  const { adapter } = await promisify(client.AddAdapter.bind(client))({ id }, metadata);
  show(adapter);
}

async function remove() {
  const { unfinished_jobs: jobs } = await promisify(client.RemoveAdapter.bind(client))(
    { id },
    metadata,
  );
  console.log(`${id}: removed; unfinished jobs that use it: ${jobs}`);
}

function show({ id, kind, models, rank, resident, rejection }) {
  const state = rejection || (resident ? "in memory" : "on disk");
  const what = kind === "ADAPTER_KIND_CONTROLNET" ? "ControlNet" : `LoRA of rank ${rank}`;
  console.log(`${id}: ${what}, for ${models.join(", ")}; ${state}`);
}

try {
  if (!verbs[verb] || (verb !== "list" && !id)) {
    console.error("usage: node adapters.js [HOST:PORT [add|remove NAME]]");
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
