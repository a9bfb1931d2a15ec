// OpenAI's own client on a Darkroom server: only the base URL and the key are changed.
//
//     npm ci
//     node openai.js "a large yellow star" star.png edited.png
//
// DARKROOM_HTTP is the server's URL, and DARKROOM_TOKEN its token if it needs one.

import { readFile, writeFile } from "node:fs/promises";

import OpenAI, { toFile } from "openai";

const [
  prompt = "a large yellow star on a blue background",
  file = "star.png",
  editedFile = "edited.png",
] = process.argv.slice(2);
const url = process.env.DARKROOM_HTTP ?? "http://127.0.0.1:8000";
const client = new OpenAI({
  baseURL: `${url}/v1`,
  apiKey: process.env.DARKROOM_TOKEN ?? "unused",
});

const { data: models } = await client.models.list();
// Fields that OpenAI's API does not have, such as seed, are sent as they are.
const request = { model: models[0].id, prompt, seed: 7 };

const stream = await client.images.generate({ ...request, stream: true, partial_images: 2 });
for await (const event of stream) {
  if (event.type === "image_generation.partial_image") {
    console.log(`preview ${event.partial_image_index}`);
  } else {
    await writeFile(file, Buffer.from(event.b64_json, "base64"));
  }
}

const images = await client.images.generate(request);
console.log(JSON.stringify({ seed: images.data[0].seed, usage: images.usage }));

// Without a mask, an image is a start: strength says how much of it is replaced.
const edited = await client.images.edit({
  ...request,
  image: await toFile(readFile(file), "start.png", { type: "image/png" }),
  prompt: "a large red star on a blue background",
  strength: 0.8,
});
await writeFile(editedFile, Buffer.from(edited.data[0].b64_json, "base64"));
