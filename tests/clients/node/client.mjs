// What the official `openai` package for Node sees of a server: one JSON object on stdout.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "How do I bake bread?" }];
const asked = { model: "demo:warm@0.8", messages, max_tokens: 12, temperature: 0 };

async function whole() {
  const answer = await client.chat.completions.create(asked);
  return { text: answer.choices[0].message.content, usage: answer.usage, steering: answer.steering };
}

async function streamed() {
  const stream = await client.chat.completions.create({
    ...asked,
    stream: true,
    stream_options: { include_usage: true },
  });
  const found = { text: "", finish: null, usage: null, steering: null };
  for await (const chunk of stream) {
    found.text += chunk.choices[0]?.delta.content ?? "";
    found.finish ??= chunk.choices[0]?.finish_reason;
    found.usage ??= chunk.usage;
    found.steering ??= chunk.steering;
  }
  return found;
}

async function runner() {
  const final = await client.chat.completions.stream(asked).finalChatCompletion();
  return final.choices[0].message.content;
}

async function aborted() {
  const stream = await client.completions.create({
    model: "demo",
    prompt: "Bread is",
    max_tokens: 400,
    ignore_eos: true,
    stream: true,
  });
  const found = { chunks: 0, id: null };
  for await (const chunk of stream) {
    found.id ??= chunk.choices[0].generation_id;
    if (++found.chunks === 5) stream.controller.abort();
  }
  return found;
}

async function refused(change) {
  try {
    await client.chat.completions.create({ ...asked, ...change });
  } catch (error) {
    return { kind: error.constructor.name, status: error.status, param: error.param };
  }
}

async function models() {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  return ids;
}

console.log(
  JSON.stringify({
    whole: await whole(),
    streamed: await streamed(),
    runner: await runner(),
    aborted: await aborted(),
    unknown: await refused({ model: "gpt-4" }),
    bad: await refused({ temprature: 1 }),
    models: await models(),
  }),
);
