# What a newcomer types. Everything else is CMake presets: see README.md.

# Open MPI refuses root, and more ranks than cores, unless told otherwise.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export OMPI_MCA_rmaps_base_oversubscribe := 1

PROMPT ?= Candle, n. 1. A
DEMO := mpirun -n 4 build/release/ternion run --model models/tiny --prompt "$(PROMPT)" --max-tokens 96 --temperature 0.6

# CMake's own words are shown only when it fails.
configure = mkdir -p build && cmake --preset release $(1) >build/configure.log 2>&1 || { cat build/configure.log; exit 1; }

.PHONY: help demo test sanitize oracle build deps clean

help:
	@echo "make demo      build, then generate text with 4 MPI ranks from the bundled model"
	@echo "make test      build and run every test"
	@echo "make sanitize  unit and loopback tests under ASan+UBSan, then under TSan"
	@echo "make oracle    compare with PyTorch and HF transformers (needs network for pip)"
	@echo "make clean     remove build/"

deps:
	@scripts/install_deps.sh

build: deps
	@echo "build: release, into build/release"
	@$(call configure,-DBUILD_TESTING=OFF)
	@cmake --build --preset release

demo: build
	@echo 'demo: $(DEMO)'
	@$(DEMO)

test: deps
	@echo "test: building everything, into build/release"
	@$(call configure,-DBUILD_TESTING=ON)
	@cmake --build --preset release
	@ctest --preset release

sanitize: deps
	@for preset in dev tsan; do \
	  echo "sanitize: $$preset"; \
	  cmake --preset $$preset >/dev/null && cmake --build --preset $$preset && ctest --preset $$preset || exit 1; \
	done

oracle: build
	@scripts/install_deps.sh python3-venv
	@tests/oracle/run.sh build/release

clean:
	rm -rf build
