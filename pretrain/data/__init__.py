"""Videos in, batches of clips out. Read `order`, `shards`, `video`, `clips`, `loader`; `pack` makes shards."""
