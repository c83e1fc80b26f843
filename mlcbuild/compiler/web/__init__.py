"""WebAssembly: TVM's runtime for browsers, compiled once, and models linked to it."""
