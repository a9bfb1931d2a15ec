// Shows your jobs on a Darkroom server, all or those of the ids, using only the .proto files.
//
//   npm ci
//   node jobs.js [REQUEST_ID ...]

import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const target = process.env.DARKROOM_TARGET ?? "127.0.0.1:50051";
const ids = process.argv.slice(2);

const definition = protoLoader.loadSync("darkroom/v1/generation.proto", {
  includeDirs: [fileURLToPath(new URL("../../protos", import.meta.url))],
  keepCase: true,
  enums: String,
  defaults: true,
  oneofs: true, // job._queue_position is set if the job waits
});
const { GenerationService } = grpc.loadPackageDefinition(definition).darkroom.v1;
const client = new GenerationService(target, grpc.credentials.createInsecure());
const get = promisify(client.GetGeneration.bind(client));
const list = promisify(client.ListGenerations.bind(client));

async function* jobs() {
  for (const request_id of ids) {
    yield (await get({ request_id })).generation;
  }
  let page_token = "";
  while (ids.length === 0) {
    const page = await list({ page_size: 100, page_token });
    yield* page.generations;
    page_token = page.next_page_token;
    if (!page_token) return;
  }
}

try {
  for await (const job of jobs()) {
    const state = job.state.replace("GENERATION_STATE_", "").toLowerCase();
    const ahead = job._queue_position ? `, ${job.queue_position} ahead` : "";
    const why = job.error_reason ? ` (${job.error_reason}: ${job.error_message})` : "";
    console.log(`${job.request_id}: ${state}${why}, step ${job.step} of ${job.steps}${ahead}`);
  }
} catch (error) {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
} finally {
  client.close();
}
