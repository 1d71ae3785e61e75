# make demo      train a small chat model on a laptop CPU, in minutes
# make test      run lint and tests
# make soak      kill a training run two hundred times and compare the result; damage files thousands of times
# make gpu       run the tests and measure every stage on an NVIDIA GPU: make gpu DATA=folder CHAT=folder
# make pictures  draw the pictures in docs/; needs `make demo`, chromium and its driver

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

DATA ?= data/fineweb_edu
CHAT ?= data/dolly

QUESTIONS := "Who are you?" "What does json.dumps do?" "How do I use sorted?"

.PHONY: demo test lint soak gpu pictures clean

# One stamp file per requirements file: if one has changed, make installs again.
$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is required") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(PY) -m pip install --quiet -r requirements-dev.txt
	@touch $@

# The same scripts as on GPUs, at sizes for a CPU.  Running it again resumes, or reuses complete outputs.
demo: $(VENV)/installed
	$(PY) prepare_sample.py --out data/sample
	$(PY) prepare_tokenizer.py --files data/sample/text.jsonl --vocab_size 2048 --out data/demo_tokenizer
	$(PY) prepare_fineweb.py --files data/sample/text.jsonl --tokenizer data/demo_tokenizer --val_fraction 0.05 \
		--out data/demo
	$(PY) prepare_dolly.py --files data/sample/chat.jsonl --val_files data/sample/chat_val.jsonl \
		--tokenizer data/demo_tokenizer --block_size 256 --out data/demo_chat
	$(PY) pretrain.py --data data/demo --out runs/demo --model demo --steps 600 --batch_tokens 2048 --lr 1e-2 \
		--val_every 150 --save_every 300
	$(PY) finetune.py --init runs/demo --data data/demo_chat --out runs/demo_chat --epochs 5 --batch_tokens 2048 \
		--lr 3e-3 --dropout 0 --val_every 300 --save_every 600 --best_by step
	@echo; echo "--- The pretrained model continues a text:"
	@$(PY) generate.py --checkpoint runs/demo --prompt "The function returns" --max_tokens 60 --temperature 0.6 --seed 1
	@echo; echo "--- The finetuned model answers three questions, with the most likely words:"
	@for question in $(QUESTIONS); do \
		echo "> $$question"; $(PY) generate.py --checkpoint runs/demo_chat --prompt "$$question" --temperature 0 || exit; done
	@echo; echo "It was trained on these questions: it recalls its training text, and makes up other answers."
	@echo; $(PY) plot.py runs/demo runs/demo_chat --out runs/demo.png
	@echo; echo "Chat with it: $(PY) generate.py --checkpoint runs/demo_chat --chat"

test: lint
	$(PY) -m pytest --numprocesses auto --dist worksteal

soak: $(VENV)/installed-dev
	$(PY) tests/soak.py --kills 200
	FUZZ_EXAMPLES=2000 $(PY) -m pytest tests/test_fuzz.py

gpu: $(VENV)/installed-dev
	$(PY) tests/gpu_report.py --data $(DATA) --chat $(CHAT)

pictures: $(VENV)/installed-dev
	$(PY) plot.py runs/demo runs/demo_chat --out docs/loss.png
	$(PY) tests/screenshot.py runs/demo_chat docs/chat.png

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) data/sample data/demo_tokenizer data/demo data/demo_chat runs/demo runs/demo_chat runs/demo.png
