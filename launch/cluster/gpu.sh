# Environment of a GPU run; sourced by slurm.sbatch, and by hand: source launch/cluster/gpu.sh
# Every line is a choice that --dry_run's memory table (the first) or the compiled step depends on.

# of a device's memory, what JAX takes at the start
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.9

# collectives beside arithmetic: pipelined, and scheduled before their results are needed
export JAX_OPTIMIZATION_LEVEL=O1
# CUDA graphs cost memory and gain nothing at seconds a step; layers' weights are read where they
# lie; collectives are joined up to a layer of klein 9B (436 MB)
export XLA_FLAGS="${XLA_FLAGS:-} \
--xla_gpu_enable_latency_hiding_scheduler=true \
--xla_gpu_enable_command_buffer= \
--xla_gpu_enable_dynamic_slice_fusion=true \
--xla_gpu_all_gather_combine_threshold_bytes=536870912 \
--xla_gpu_reduce_scatter_combine_threshold_bytes=536870912 \
--xla_gpu_all_reduce_combine_threshold_bytes=536870912"

# reductions inside NVLink switches; kernels are issued in order, so that collectives overlap
export NCCL_NVLS_ENABLE=1
export CUDA_DEVICE_MAX_CONNECTIONS=1
# over several nodes, name the network if NCCL picks another: export NCCL_SOCKET_IFNAME=eth0
