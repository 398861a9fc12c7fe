// Perfetto's trace processor, as WebAssembly, behind stdin and stdout: both carry its RPC protocol. The argument is the
// folder with the program and with the JavaScript that was generated with it, for a web worker.
import { readFileSync, readSync, writeSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import vm from "node:vm";

const folder = process.argv[2];
let source = readFileSync(join(folder, "engine_bundle.node.js"), "utf8");
for (const [before, after] of [
  ["this.useMemory64 = hasMemory64Support();", "this.useMemory64 = false;"],
  ["locateFile: (s) => s,", "locateFile: (s) => s, wasmBinary: globalThis.program,"],
  ["const wasmBridge = new", "const wasmBridge = globalThis.bridge = new"],
]) {
  if (source.split(before).length !== 2) throw new Error(`not once in engine_bundle.node.js: ${before}`);
  source = source.replace(before, after);
}
Object.assign(globalThis, { self: globalThis, WorkerGlobalScope: class {} });
Object.defineProperty(globalThis, "location", { value: { href: `${pathToFileURL(folder)}/` } });
globalThis.program = readFileSync(join(folder, "trace_processor.wasm"));
console.log = console.warn = console.error; // stdout is the protocol's
vm.runInThisContext(source);

const bridge = globalThis.bridge;
while (!bridge.reqBufferAddr) await new Promise((resolve) => setTimeout(resolve, 5));
bridge.messagePort = {
  postMessage: (bytes) => {
    for (let written = 0; written < bytes.length; ) written += writeSync(1, bytes, written);
  },
};
const buffer = Buffer.alloc(1 << 20);
for (let read; (read = readSync(0, buffer)) > 0; ) bridge.onMessage({ data: new Uint8Array(buffer.subarray(0, read)) });
