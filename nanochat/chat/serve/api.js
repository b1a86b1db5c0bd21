// The server's OpenAI-shaped endpoints, as the page uses them.

export class ApiError extends Error {
  constructor(status, error) {
    super(error?.message || `the server answered with status ${status}`);
    this.name = "ApiError";
    this.status = status;
    this.code = error?.code;
  }
}

function headers(key) {
  const all = { "Content-Type": "application/json" };
  if (key) all.Authorization = `Bearer ${key}`;
  return all;
}

async function check(response) {
  if (response.ok) return response;
  let error = null;
  try {
    error = (await response.json()).error;
  } catch {
    error = { message: `the server answered with status ${response.status}` };
  }
  throw new ApiError(response.status, error);
}

export async function models(key) {
  const response = await check(await fetch("v1/models", { headers: headers(key) }));
  return (await response.json()).data;
}

// Yields the parsed events of a streamed answer; throws ApiError for an error, before or in the middle of it.
export async function* stream(endpoint, body, key, signal) {
  const response = await check(
    await fetch(endpoint, { method: "POST", headers: headers(key), body: JSON.stringify(body), signal }),
  );
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError(0, { message: "the connection ended before the answer was complete" });
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue; // a keep-alive comment
      const data = event.slice(6);
      if (data === "[DONE]") return;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new ApiError(0, parsed.error);
      yield parsed;
    }
  }
}
