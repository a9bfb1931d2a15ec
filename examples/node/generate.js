// Generates one image on a Darkroom server, using only the .proto files.
//
//   npm ci
//   node generate.js "a large yellow star on a blue background" star.png [HOST:PORT]

import { writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [prompt, path, target = process.env.DARKROOM_TARGET ?? "127.0.0.1:50051"] =
  process.argv.slice(2);
if (!prompt || !path) {
  console.error("usage: node generate.js PROMPT FILE.png [HOST:PORT]");
  process.exit(2);
}

const MAX_REPLY_BYTES = 64 * 1024 * 1024;

const definition = protoLoader.loadSync("darkroom/v1/generation.proto", {
  includeDirs: [fileURLToPath(new URL("../../protos", import.meta.url))],
  keepCase: true,
  enums: String,
  longs: String, // a seed has 63 bits, a JavaScript number 53
  defaults: true,
});
const { GenerationService } = grpc.loadPackageDefinition(definition).darkroom.v1;

const client = new GenerationService(target, grpc.credentials.createInsecure(), {
  "grpc.max_receive_message_length": MAX_REPLY_BYTES,
});

// The largest reply that we accept. The server rejects a request that could exceed it before any work.
const metadata = new grpc.Metadata();
metadata.set("darkroom-max-reply-bytes", String(MAX_REPLY_BYTES));

const request = { prompt, seed: "7", format: "IMAGE_FORMAT_PNG" };
const deadline = Date.now() + 120_000;

client.Generate(request, metadata, { deadline }, (error, response) => {
  client.close();
  if (error) {
    console.error(`${grpc.status[error.code]}: ${error.details}`);
    process.exitCode = 1;
    return;
  }
  const [image] = response.images;
  writeFileSync(path, image.data);
  console.log(
    JSON.stringify({ path, width: image.width, height: image.height, seed: image.seed }),
  );
});
