// Lists the LoRA adapters and ControlNets of a Darkroom server, using only the .proto files.
//
//   npm ci
//   node adapters.js [HOST:PORT]

import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [target = process.env.DARKROOM_TARGET ?? "127.0.0.1:50051"] = process.argv.slice(2);

const definition = protoLoader.loadSync("darkroom/v1/model.proto", {
  includeDirs: [fileURLToPath(new URL("../../protos", import.meta.url))],
  keepCase: true,
  enums: String,
  longs: Number,
  defaults: true,
});
const { ModelService } = grpc.loadPackageDefinition(definition).darkroom.v1;
const client = new ModelService(target, grpc.credentials.createInsecure());
const listAdapters = promisify(client.ListAdapters.bind(client));

try {
  const { adapters } = await listAdapters({});
  for (const { id, kind, models, rank, resident, rejection } of adapters) {
    const state = rejection || (resident ? "in memory" : "on disk");
    const what = kind === "ADAPTER_KIND_CONTROLNET" ? "ControlNet" : `LoRA of rank ${rank}`;
    console.log(`${id}: ${what}, for ${models.join(", ")}; ${state}`);
  }
  if (!adapters.length) console.log("no adapters: start the server with --lora or --controlnet");
} catch (error) {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
} finally {
  client.close();
}
