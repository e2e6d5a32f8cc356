//! Kernels on cust's buffers and streams. `make test-cust` builds and runs this with the emulator
//! as libcuda. The crate `cuda-emulator` must not be used here: its functions would be linked
//! into the program, beside those of the library.
#![cfg(feature = "cust")]

use ::cust::device::Device;
use ::cust::memory::{CopyDestination, DeviceBuffer};
use ::cust::stream::{Stream, StreamFlags};
use dust_kernels::cuda::Fault;
use dust_kernels::cuda::cust::{CustKernels, address, stream};
use dust_kernels::grpo::{AdvantageConfig, Grpo, GrpoConfig, SequenceStats};
use dust_kernels::norm::{Norm, NormShape};
use dust_kernels::{Cpu, Device as _};
use half::bf16;

fn download<T: ::cust::memory::DeviceCopy + Default>(buffer: &DeviceBuffer<T>) -> Vec<T> {
    let mut host = vec![T::default(); buffer.len()];
    buffer.copy_to(&mut host).unwrap();
    host
}

#[test]
fn kernels_run_on_the_buffers_and_streams_of_cust() {
    let context = ::cust::quick_init().unwrap();
    // All checks are on there: what they find fails the next call.
    let name = Device::get_device(0).unwrap().name().unwrap();
    assert!(name.starts_with("cuda-emulator"), "{name}");
    let kernels = CustKernels::new(&context).unwrap();
    let on = Stream::new(StreamFlags::NON_BLOCKING, None).unwrap();
    let cpu = Cpu::with_threads(1);

    // RMSNorm of bf16, which cust knows as bits.
    let shape = NormShape { rows: 3, width: 16 };
    let x: Vec<bf16> = (0..48)
        .map(|i| bf16::from_f32((i % 7) as f32 - 3.0))
        .collect();
    let weight: Vec<f32> = (0..16).map(|i| 1.0 + i as f32 / 16.0).collect();
    let x_bits: Vec<u16> = x.iter().map(|x| x.to_bits()).collect();
    let device_x = DeviceBuffer::from_slice(&x_bits).unwrap();
    let device_weight = DeviceBuffer::from_slice(&weight).unwrap();
    let y = DeviceBuffer::<u16>::zeroed(48).unwrap();
    let rstd = DeviceBuffer::<f32>::zeroed(3).unwrap();
    // SAFETY: the buffers have the shape's lengths, live on, and are the driver's, so aligned.
    unsafe {
        kernels.rms_norm(
            stream(&on),
            shape,
            1e-6,
            address(&device_x),
            address(&device_weight),
            address(&y),
            address(&rstd),
        )
    }
    .unwrap();
    on.synchronize().unwrap();
    let x: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
    let (x, weight) = (cpu.upload(&x).unwrap(), cpu.upload(&weight).unwrap());
    let (mut want, mut want_rstd) = (cpu.zeros(48).unwrap(), cpu.zeros(3).unwrap());
    cpu.rms_norm(shape, 1e-6, &x, &weight, &mut want, &mut want_rstd)
        .unwrap();
    for (got, want) in download(&y).into_iter().zip(cpu.download(&want).unwrap()) {
        let got = bf16::from_bits(got).to_f32();
        assert!((got - want).abs() <= 0.005 * want.abs(), "{got} {want}");
    }

    // Advantages, and the loss by them.
    let rewards = DeviceBuffer::from_slice(&[1f32, 0.0]).unwrap();
    let advantages = DeviceBuffer::<f32>::zeroed(2).unwrap();
    let exact = AdvantageConfig {
        eps: 0.0,
        ..Default::default()
    };
    let offsets = DeviceBuffer::from_slice(&[0u32, 1, 4]).unwrap();
    let weights = DeviceBuffer::from_slice(&[0.25f32; 2]).unwrap();
    let new = DeviceBuffer::from_slice(&[-1.0f32, -2.0, -0.5, -0.1]).unwrap();
    let old = DeviceBuffer::from_slice(&[-1.1f32, -2.0, -0.9, -0.1]).unwrap();
    let gradient = DeviceBuffer::<f32>::zeroed(4).unwrap();
    // Two sequences' statistics, 8 floats each.
    let stats = DeviceBuffer::<f32>::zeroed(16).unwrap();
    let scratch = DeviceBuffer::<u32>::zeroed(1).unwrap();
    let config = GrpoConfig::default();
    // SAFETY: as above: 2 sequences of 4 tokens, no reference; the scratch is one word.
    unsafe {
        kernels
            .advantages(
                stream(&on),
                1,
                2,
                exact,
                address(&rewards),
                address(&advantages),
            )
            .unwrap();
        kernels
            .grpo_loss(
                stream(&on),
                &config,
                2,
                4,
                address(&offsets),
                address(&weights),
                address(&advantages),
                address(&new),
                address(&old),
                0,
                address(&gradient),
                address(&stats),
                address(&scratch),
                Fault::IGNORED,
            )
            .unwrap();
    }
    on.synchronize().unwrap();
    assert_eq!(download(&advantages), [1.0, -1.0]);
    let up = |x: &[f32]| cpu.upload(x).unwrap();
    let (mut want, mut want_stats) = (cpu.zeros(4).unwrap(), cpu.zeros(2).unwrap());
    cpu.grpo_loss(
        &config,
        2,
        4,
        &cpu.upload(&[0u32, 1, 4]).unwrap(),
        &up(&[0.25; 2]),
        &up(&[1.0, -1.0]),
        &up(&download(&new)),
        &up(&download(&old)),
        None,
        &mut want,
        &mut want_stats,
    )
    .unwrap();
    for (got, want) in download(&gradient).iter().zip(cpu.download(&want).unwrap()) {
        assert!((got - want).abs() <= 1e-6, "{got} {want}");
    }
    let want_stats: Vec<SequenceStats> = cpu.download(&want_stats).unwrap();
    for (got, want) in download(&stats)
        .iter()
        .zip(bytemuck::cast_slice(&want_stats))
    {
        let want: &f32 = want;
        assert!((got - want).abs() <= 1e-6, "{got} {want}");
    }
}
