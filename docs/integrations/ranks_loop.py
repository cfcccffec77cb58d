"""A distiller in a loop of plain torch, by several processes."""

import gc

import torch
from safetensors.torch import save_file

import kdlib


def train(distiller, data, epochs, batch=32):
    loader = kdlib.Loader(data, batch=batch, shards="rows")  # of each batch a rank gets its run of the rows
    wrapped = kdlib.ddp(distiller, next(loader.epoch(kdlib.CLEAN)))  # makes the projectors, too
    optimizer = distiller.attach(torch.optim.Adam(distiller.parameters()))
    wrapped.train()
    for epoch in range(epochs):
        for rows in loader.epoch(epoch):
            losses = wrapped(rows)
            optimizer.zero_grad()
            (rows["share"] * losses.total).backward()  # DDP takes the mean over ranks; so each row counts the same
            optimizer.step()


def main(make_distiller, data, epochs):
    torch.distributed.init_process_group("gloo")  # "nccl" on GPUs, after torch.cuda.set_device(LOCAL_RANK)
    distiller = make_distiller()
    train(distiller, data, epochs)
    if torch.distributed.get_rank() == 0:
        save_file(distiller.student.model.state_dict(), "student.safetensors")
    gc.collect()  # the wrapper is in a reference cycle, and has to go before the group
    torch.distributed.destroy_process_group()
