import torch
from llmcompressor.utils.dev import get_main_device
from loguru import logger

from elsa_cli.output import logs_to_stderr


def test_there_being_no_accelerator_is_said_once_and_as_it_is(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    said = []
    sink = logger.add(lambda message: said.append(message.record))
    try:
        with logs_to_stderr():
            get_main_device()
            logger.info("other things")
            print("a line")
    finally:
        logger.remove(sink)
    lines = [(record["message"], record["extra"].get("log_once", False)) for record in said]
    # llm-compressor's own sinks let nothing through twice that has log_once.
    assert lines == [("No accelerator available: computing on the CPU", True), ("other things", False)]
    assert "a line" in capsys.readouterr().err
