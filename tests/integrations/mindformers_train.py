"""Train through mindformers' Trainer on a CPU and print what changed, as one line of JSON.

    python mindformers_train.py [PET_TYPE]        # colora_lora or colora_lily
"""

import json
import sys
from pathlib import Path

import numpy as np

import mindformers
import mindspore.dataset as ds
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import nn
from mindspore.train import Callback

import colora_ms.integrations.mindformers as bridge
from colora_ms.integrations.mindformers import pet


@MindFormerRegister.register(MindFormerModuleType.WRAPPER)
class PlainStep(nn.TrainOneStepCell):
    def __init__(self, network, optimizer, **kwargs):
        super().__init__(network, optimizer)


def main(pet_type="colora_lora"):
    bridge.register()
    handles, inject = [], pet.inject
    pet.inject = lambda *args: handles.append(inject(*args)) or handles[-1]
    config = mindformers.MindFormerConfig(str(Path(__file__).with_suffix(".yaml")))
    config.model.model_config.pet_config.pet_type = pet_type
    if pet_type == "colora_lily":
        del config.model.model_config.pet_config["lora_alpha"]
    mindformers.build_context(config)
    ids = np.random.default_rng(0).integers(3, 97, (8, 17)).astype(np.int32)
    data = ds.NumpySlicesDataset({"input_ids": ids}, shuffle=False).batch(2)
    start = {}

    class Snapshot(Callback):
        losses = []

        def on_train_begin(self, run_context):
            for parameter in run_context.original_args().train_network.get_parameters():
                start[parameter.name] = parameter.asnumpy().copy()
            self.state = [p.name for p in run_context.original_args().train_network.optimizer.get_parameters()]

        def on_train_step_end(self, run_context):
            outputs = run_context.original_args().net_outputs
            self.losses.append(float(np.ravel((outputs[0] if isinstance(outputs, tuple) else outputs).asnumpy())[0]))

    snapshot = Snapshot()
    trainer = mindformers.Trainer(args=config, train_dataset=data, callbacks=[snapshot])
    trainer.train()
    handle = handles[0]
    changed = [p.name for p in handle.net.get_parameters() if not np.array_equal(p.asnumpy(), start[p.name])]
    print("RESULT", json.dumps({"losses": snapshot.losses, "changed": sorted(changed),
                                "targets": len(handle.matched().targets),
                                "trained": sorted(p.name for p in handle.trainable_params()), "state": snapshot.state}))


if __name__ == "__main__":
    main(*sys.argv[1:])
