// Uploads an image and generates another one from it, using only the .proto files: one that starts
// from it, an edit of it, or one that a ControlNet guides by it.
//
//   npm ci
//   node image.js "a red circle" photo.jpg star.png [HOST:PORT]
//   node image.js --edit "make the star green" photo.jpg star.png [HOST:PORT]
//   node image.js --control position --scale 0.8 "a yellow star" shape.png star.png [HOST:PORT]

import { readFileSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { parseArgs, promisify } from "node:util";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    edit: { type: "boolean" }, // needs a model with the task TASK_EDIT
    control: { type: "string" }, // a ControlNet of `node adapters.js`
    scale: { type: "string", default: "1" },
  },
});
const [prompt, input, path, target = process.env.DARKROOM_TARGET ?? "127.0.0.1:50051"] =
  positionals;
if (!prompt || !input || !path || (options.edit && options.control)) {
  console.error(
    "usage: node image.js [--edit | --control ID [--scale S]] PROMPT IMAGE FILE.png [HOST:PORT]",
  );
  process.exit(2);
}

const MAX_REPLY_BYTES = 64 * 1024 * 1024;
const CHUNK_BYTES = 512 * 1024; // the most that the server takes in a message of an upload

const protos = ["darkroom/v1/generation.proto", "darkroom/v1/image.proto"];
const definition = protoLoader.loadSync(protos, {
  includeDirs: [fileURLToPath(new URL("../../protos", import.meta.url))],
  keepCase: true,
  enums: String,
  longs: String, // a seed has 63 bits, a JavaScript number 53
  defaults: true,
});
const { GenerationService, ImageService } = grpc.loadPackageDefinition(definition).darkroom.v1;

const client = new GenerationService(target, grpc.credentials.createInsecure(), {
  "grpc.max_receive_message_length": MAX_REPLY_BYTES,
});
const images = new ImageService(target, grpc.credentials.createInsecure());
const generate = promisify(client.Generate.bind(client));

const metadata = new grpc.Metadata();
metadata.set("darkroom-max-reply-bytes", String(MAX_REPLY_BYTES));

function upload(file) {
  return new Promise((resolve, reject) => {
    const call = images.UploadImage((error, response) =>
      error ? reject(error) : resolve(response.upload_id),
    );
    for (let at = 0; at < file.length; at += CHUNK_BYTES) {
      call.write({ chunk: file.subarray(at, at + CHUNK_BYTES) });
    }
    call.end();
  });
}

// The task follows from the field that the image is in.
function fieldsOf(image) {
  if (options.edit) return { reference_images: [image] };
  if (options.control) {
    return { controls: [{ id: options.control, image, scale: Number(options.scale) }] };
  }
  return { image, strength: 0.6 };
}

// The server may have removed an upload: then its reason is UPLOAD_NOT_FOUND, and it is sent again.
async function generateFrom(file) {
  for (let left = 2; ; left -= 1) {
    const fields = fieldsOf({ upload_id: await upload(file) });
    const request = { prompt, ...fields, seed: "7", format: "IMAGE_FORMAT_PNG" };
    try {
      return await generate(request, metadata, { deadline: Date.now() + 120_000 });
    } catch (error) {
      if (error.code !== grpc.status.FAILED_PRECONDITION || left === 0) throw error;
    }
  }
}

try {
  const [image] = (await generateFrom(readFileSync(input))).images;
  writeFileSync(path, image.data);
  console.log(
    JSON.stringify({ path, width: image.width, height: image.height, seed: image.seed }),
  );
} catch (error) {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
} finally {
  client.close();
  images.close();
}
