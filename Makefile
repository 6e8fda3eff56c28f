check:
	mkdir -p build/namespace/holdfast && ln -sfn $(CURDIR)/engine build/namespace/holdfast/engine && ln -sfn $(CURDIR)/states build/namespace/holdfast/states
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy -p holdfast.states -p holdfast.engine
