// Generates one image on a Darkroom server and shows its progress, using only the .proto files.
//
//   npm ci
//   node stream.js "a large yellow star on a blue background" star.png [HOST:PORT]
//
// Ctrl-C cancels: the server stops after the current step.

import { randomUUID } from "node:crypto";
import { writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [prompt, path, target = process.env.DARKROOM_TARGET ?? "127.0.0.1:50051"] =
  process.argv.slice(2);
if (!prompt || !path) {
  console.error("usage: node stream.js PROMPT FILE.png [HOST:PORT]");
  process.exit(2);
}

const definition = protoLoader.loadSync("darkroom/v1/generation.proto", {
  includeDirs: [fileURLToPath(new URL("../../protos", import.meta.url))],
  keepCase: true,
  enums: String,
  longs: String, // a seed has 63 bits, a JavaScript number 53
  defaults: true,
  oneofs: true, // event.event names the field that is set
});
const { GenerationService } = grpc.loadPackageDefinition(definition).darkroom.v1;
const client = new GenerationService(target, grpc.credentials.createInsecure());

const call = client.GenerateStream(
  {
    generation: {
      prompt,
      seed: "7",
      format: "IMAGE_FORMAT_PNG",
      request_id: randomUUID(),
      on_disconnect: "ON_DISCONNECT_CANCEL",
    },
  },
  { deadline: Date.now() + 120_000 },
);
process.once("SIGINT", () => call.cancel());

let image;
let chunks = [];

call.on("data", ({ event }) => {
  switch (event.event) {
    case "accepted":
      console.log(`accepted: seed ${event.accepted.seeds[0]}`);
      break;
    case "progress":
      console.log(`step ${event.progress.step} of ${event.progress.steps}`);
      break;
    case "image": {
      // An image comes in chunks, in order; the first one describes it.
      const chunk = event.image;
      if (chunk.offset === "0") [image, chunks] = [chunk.image, []];
      chunks.push(chunk.data);
      break;
    }
    case "finished":
      writeFileSync(path, Buffer.concat(chunks));
      console.log(
        JSON.stringify({ path, width: image.width, height: image.height, seed: image.seed }),
      );
      break;
  }
});
call.on("error", (error) => {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
  client.close();
});
call.on("end", () => client.close());
