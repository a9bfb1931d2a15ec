// Shows what a Darkroom server is doing and how it runs its models, using only the .proto files.
//
//   npm ci
//   node status.js [HOST:PORT]

import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [target = process.env.DARKROOM_TARGET ?? "127.0.0.1:50051"] = process.argv.slice(2);

const definition = protoLoader.loadSync("darkroom/v1/server.proto", {
  includeDirs: [fileURLToPath(new URL("../../protos", import.meta.url))],
  keepCase: true,
  enums: String,
  longs: Number,
  defaults: true,
});
const { ServerService } = grpc.loadPackageDefinition(definition).darkroom.v1;
const client = new ServerService(target, grpc.credentials.createInsecure());
const getStatus = promisify(client.GetStatus.bind(client));

const word = (name, prefix) => name.replace(prefix, "").toLowerCase();

try {
  const status = await getStatus({});
  const state = word(status.state, "SERVER_STATE_");
  const jobs = `${status.running_jobs} running, ${status.queued_jobs} of ${status.max_queued_jobs} queued`;
  console.log(`darkroom-server ${status.version}: ${state}; jobs: ${jobs}`);
  for (const model of status.models) {
    const place = word(model.state, "MODEL_STATE_");
    if (!model.ready) {
      const why = model.state_reason ? `: ${model.state_reason}` : "";
      console.log(`model ${model.id}: ${place}${why}`);
      continue;
    }
    const { dtype, channels_last, preset, device, format_rule, denoiser } = model.runtime;
    const { quantization, offload } = model.runtime;
    const word_of = (last) => (last ? "channels_last" : "contiguous");
    // Older servers do not say it: there the VAE has the denoiser's layout.
    const vae = "vae_channels_last" in model.runtime ? model.runtime.vae_channels_last : channels_last;
    const layout = word_of(channels_last) + (vae === channels_last ? "" : ` (VAE ${word_of(vae)})`);
    const why = format_rule ? ` (${format_rule})` : "";
    console.log(`model ${model.id}: ${dtype} ${layout}${why}, preset ${preset} on ${device}, ${denoiser} denoiser`);
    if (quantization || offload) {
      console.log(`  weights in ${quantization || dtype}, offload: ${offload || "none"}`);
    }
    const source = word(model.row_limit_source, "ROW_LIMIT_SOURCE_");
    console.log(`  rows of a batch: ${model.max_rows} at most (${source})`);
    const used = model.last_used ? new Date(1000 * model.last_used.seconds).toISOString() : "never";
    console.log(`  ${place}, ${model.weight_bytes} bytes of weights, last used: ${used}`);
  }
  for (const engine of status.engines) {
    const ready = engine.ready ? "ready" : "not ready";
    const restarts = `${engine.restarts} restarts`;
    console.log(`engine ${engine.index} on ${engine.device}: ${ready}, ${engine.samples} images, ${restarts}`);
  }
} catch (error) {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
} finally {
  client.close();
}
