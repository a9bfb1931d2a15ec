// Lists your jobs on a Darkroom server, using only the .proto files.
//
//   npm ci
//   node jobs.js [HOST:PORT]

import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [target = process.env.DARKROOM_TARGET ?? "127.0.0.1:50051"] = process.argv.slice(2);

const definition = protoLoader.loadSync("darkroom/v1/generation.proto", {
  includeDirs: [fileURLToPath(new URL("../../protos", import.meta.url))],
  keepCase: true,
  enums: String,
  defaults: true,
  oneofs: true, // job._queue_position is set if the job waits
});
const { GenerationService } = grpc.loadPackageDefinition(definition).darkroom.v1;
const client = new GenerationService(target, grpc.credentials.createInsecure());
const list = promisify(client.ListGenerations.bind(client));

try {
  let page_token = "";
  do {
    const page = await list({ page_size: 100, page_token });
    for (const job of page.generations) {
      const state = job.state.replace("GENERATION_STATE_", "").toLowerCase();
      const ahead = job._queue_position ? `, ${job.queue_position} ahead` : "";
      console.log(`${job.request_id}: ${state}, step ${job.step} of ${job.steps}${ahead}`);
    }
    page_token = page.next_page_token;
  } while (page_token);
} catch (error) {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
} finally {
  client.close();
}
