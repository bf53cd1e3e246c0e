// After a candidate's code: calls its function once per row of arguments; a line per result on descriptor 3.
{
  const encode = (value) => {
    if (value === null || typeof value === "boolean" || typeof value === "string") return value;
    if (typeof value === "number" && Number.isFinite(value)) return value;
    if (Array.isArray(value)) return { list: Array.from(value, encode) };
    if (typeof value === "object" && [Object.prototype, null].includes(Object.getPrototypeOf(value)))
      return { dict: Object.entries(value).map(([key, item]) => [key, encode(item)]) };
    throw new TypeError(`a value of type ${typeof value} cannot leave the sandbox`);
  };
  const send = (report) => require("fs").writeSync(3, "@NONCE@ " + JSON.stringify(report) + "\n");
  const failed = (error, stage) => ({ error: error?.name ?? "Error", detail: String(error?.message ?? error), stage });
  if (typeof @ENTRY@ !== "function") {
    send({ error: "no_function", stage: "find" });
    process.exit(1);
  }
  for (const row of JSON.parse(require("fs").readFileSync(0, "utf8"))) {
    let value;
    try {
      value = @ENTRY@(...row);
    } catch (error) {
      send(failed(error, "call"));
      process.exit(1);
    }
    try {
      send({ value: encode(value) });
    } catch (error) {
      send(failed(error, "value"));
      process.exit(1);
    }
  }
  process.exit(0);
}
