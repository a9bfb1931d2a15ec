// Generates one image on a Darkroom server, using only the .proto files.
//
//   npm ci
//   node generate.js "a large yellow star on a blue background" star.png [HOST:PORT]

import { writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [prompt, path, target = process.env.DARKROOM_TARGET ?? "127.0.0.1:50051"] =
  process.argv.slice(2);
if (!prompt || !path) {
  console.error("usage: node generate.js PROMPT FILE.png [HOST:PORT]");
  process.exit(2);
}

const MAX_REPLY_BYTES = 64 * 1024 * 1024;

const protos = ["darkroom/v1/generation.proto", "darkroom/v1/model.proto"];
const definition = protoLoader.loadSync(protos, {
  includeDirs: [fileURLToPath(new URL("../../protos", import.meta.url))],
  keepCase: true,
  enums: String,
  longs: String, // a seed has 63 bits, a JavaScript number 53
  defaults: true,
});
const { GenerationService, ModelService } = grpc.loadPackageDefinition(definition).darkroom.v1;

const client = new GenerationService(target, grpc.credentials.createInsecure(), {
  "grpc.max_receive_message_length": MAX_REPLY_BYTES,
});
const models = new ModelService(target, grpc.credentials.createInsecure());
const generate = promisify(client.Generate.bind(client));
const getModel = promisify(models.GetModel.bind(models));

// The largest reply that we accept. The server rejects a request that could exceed it before any work.
const metadata = new grpc.Metadata();
metadata.set("darkroom-max-reply-bytes", String(MAX_REPLY_BYTES));

const request = { prompt, seed: "7", format: "IMAGE_FORMAT_PNG" };
const deadline = Date.now() + 120_000;

try {
  // The server rejects a field that the model does not take.
  const { model } = await getModel({}, { deadline });
  if (model.optional_fields.includes("true_cfg_scale")) {
    // The guidance of a model with embedded guidance; it needs a negative prompt.
    Object.assign(request, { true_cfg_scale: 4, negative_prompt: "blurry" });
  }
  const response = await generate(request, metadata, { deadline });
  const [image] = response.images;
  writeFileSync(path, image.data);
  console.log(
    JSON.stringify({ path, width: image.width, height: image.height, seed: image.seed }),
  );
} catch (error) {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
} finally {
  client.close();
  models.close();
}
