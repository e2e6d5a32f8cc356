//! Memory of the CUDA back end: copies in, out and within, and what is refused.
#![cfg(feature = "cuda")]

mod common {
    pub mod cuda;
}

use common::cuda::*;
use dust_kernels::activation::Activation;
use dust_kernels::adamw::{AdamW, AdamWConfig};
use dust_kernels::cuda::cudarc::driver::{CudaContext, DevicePtr};
use dust_kernels::cuda::{Fault, MODULES};
use dust_kernels::gemm::{Gemm, LinearShape};
use dust_kernels::{Buffer, Cuda, Device, Error, Weight};
use half::bf16;

#[test]
fn buffers_begin_as_zeros_and_keep_what_is_written() {
    with_cuda(|cuda, _| {
        let mut buffer = cuda.zeros::<u32>(1000).unwrap();
        assert_eq!(buffer.len(), 1000);
        assert_eq!(cuda.download(&buffer).unwrap(), [0; 1000]);
        cuda.write(&mut buffer, 10, &[1, 2, 3]).unwrap();
        let mut host = [0; 5];
        cuda.read(&buffer, 9, &mut host).unwrap();
        assert_eq!(host, [0, 1, 2, 3, 0]);
        cuda.fill_zero(&mut buffer).unwrap();
        assert_eq!(cuda.download(&buffer).unwrap(), [0; 1000]);
    });
}

#[test]
fn an_empty_buffer_is_a_buffer() {
    with_cuda(|cuda, _| {
        let mut none = cuda.upload::<f32>(&[]).unwrap();
        assert!(none.is_empty());
        cuda.write(&mut none, 0, &[]).unwrap();
        cuda.fill_zero(&mut none).unwrap();
        cuda.copy_within(&mut none, 0, 0, 0).unwrap();
        assert!(cuda.download(&none).unwrap().is_empty());
    });
}

#[test]
fn copies_go_between_and_within_buffers() {
    with_cuda(|cuda, _| {
        let numbers: Vec<u16> = (0..5000).collect();
        let src = cuda.upload(&numbers).unwrap();
        let mut dst = cuda.zeros::<u16>(5000).unwrap();
        cuda.copy(&src, 7, &mut dst, 100, 4000).unwrap();
        let got = cuda.download(&dst).unwrap();
        assert_eq!(got[100..4100], numbers[7..4007]);
        assert!(got[..100].iter().chain(&got[4100..]).all(|&n| n == 0));
        // Apart, overlapping up and down, and onto itself.
        for (from, to, len) in [(0, 3000, 2000), (0, 1, 4999), (1, 0, 4999), (9, 9, 100)] {
            let mut buffer = cuda.upload(&numbers).unwrap();
            let mut want = numbers.clone();
            want.copy_within(from..from + len, to);
            cuda.copy_within(&mut buffer, from, to, len).unwrap();
            assert_eq!(cuda.download(&buffer).unwrap(), want, "{from} to {to}");
        }
    });
}

#[test]
fn copies_beyond_the_end_are_refused() {
    with_cuda(|cuda, _| {
        let mut a = cuda.zeros::<f32>(4).unwrap();
        let mut b = cuda.zeros::<f32>(4).unwrap();
        let refused = |result| matches!(result, Err(Error::TooShort { .. }));
        assert!(refused(cuda.write(&mut a, 3, &[0.0; 2])));
        assert!(refused(cuda.write(&mut a, usize::MAX, &[0.0; 2])));
        assert!(refused(cuda.read(&a, 1, &mut [0.0; 4])));
        assert!(refused(cuda.copy(&a, 1, &mut b, 0, 4)));
        assert!(refused(cuda.copy(&a, 0, &mut b, 4, 1)));
        assert!(refused(cuda.copy_within(&mut a, 0, 2, 3)));
        assert!(refused(cuda.copy_within(&mut a, 0, usize::MAX, 2)));
    });
}

#[test]
fn too_much_memory_is_an_error() {
    with_cuda(|cuda, _| {
        let result = cuda.zeros::<f32>(1 << 40).map(|_| ());
        let bytes = 4 << 40;
        assert_eq!(result, Err(Error::OutOfMemory { bytes }));
        let result = cuda.zeros::<f32>(usize::MAX).map(|_| ());
        assert_eq!(result, Err(Error::OutOfMemory { bytes: usize::MAX }));
        // The device goes on.
        assert_eq!(
            cuda.download(&cuda.zeros::<u8>(3).unwrap()).unwrap(),
            [0; 3]
        );
    });
}

#[test]
fn a_device_that_is_not_there_is_an_error() {
    with_cuda(|cuda, _| {
        assert!(cuda.name().ends_with("(cuda:0)"), "{}", cuda.name());
        assert!(matches!(Cuda::new(99), Err(Error::Device { .. })));
        assert!(matches!(Cuda::new(usize::MAX), Err(Error::Device { .. })));
    });
}

#[test]
fn buffers_of_another_device_are_refused() {
    with_cuda(|cuda, _| {
        let other = Cuda::new(0).unwrap();
        let clone = cuda.clone();
        let foreign = |result| matches!(result, Err(Error::Invalid { .. }));
        let (mut a, mut b) = (
            cuda.zeros::<f32>(4).unwrap(),
            other.zeros::<f32>(4).unwrap(),
        );
        assert!(foreign(cuda.write(&mut b, 0, &[0.0])));
        assert!(foreign(cuda.read(&b, 0, &mut [0.0])));
        assert!(foreign(cuda.copy(&a, 0, &mut b, 0, 1)));
        assert!(foreign(cuda.copy(&b, 0, &mut a, 0, 1)));
        assert!(foreign(cuda.copy_within(&mut b, 0, 1, 1)));
        assert!(foreign(cuda.fill_zero(&mut b)));
        // Clones are one device.
        clone.copy_within(&mut a, 0, 1, 1).unwrap();

        // One argument at a time, among them weights and what may be left out.
        let shape = LinearShape {
            rows: 1,
            inputs: 8,
            outputs: 8,
        };
        for (at, on) in [[&other, cuda, cuda, cuda], [cuda, &other, cuda, cuda]]
            .into_iter()
            .chain([[cuda, cuda, &other, cuda], [cuda, cuda, cuda, &other]])
            .enumerate()
        {
            let [x, w, bias, y] = on;
            let (x, w) = (x.zeros(8).unwrap(), w.zeros(64).unwrap());
            let bias = bias.zeros(8).unwrap();
            let mut y = y.zeros(8).unwrap();
            let result = cuda.linear(shape, &x, Weight::Bf16(&w), Some(&bias), &mut y);
            assert!(foreign(result), "argument {at}");
        }
        let scalars = || cuda.zeros::<f32>(8).unwrap();
        let (mut param, mut m, mut v) = (scalars(), scalars(), scalars());
        let mut copy = other.zeros::<bf16>(8).unwrap();
        let config = AdamWConfig::default();
        let (scale, grad) = (scalars(), scalars());
        let mut step =
            |copy| cuda.adamw(&config, 8, &scale, &grad, &mut param, &mut m, &mut v, copy);
        assert!(foreign(step(Some(&mut copy))));
        step(None).unwrap();
    });
}

#[test]
fn a_device_works_on_a_stream_and_memory_of_cudarc() {
    with_cuda(|_, _| {
        let context = CudaContext::new(0).unwrap();
        let stream = context.new_stream().unwrap();
        // SAFETY: nobody captures the stream.
        let cuda = unsafe { Cuda::on_stream(stream.clone()) }.unwrap();
        assert_eq!(cuda.stream(), stream.cu_stream());
        // Tracking of events is the context's affair.
        assert!(context.is_event_tracking());
        let foreign = context.new_stream().unwrap();
        for stream in [&stream, &foreign] {
            let slice = stream.clone_htod(&[1u32, 2, 3]).unwrap();
            let address = slice.device_ptr(stream).0;
            let mut buffer = cuda.adopt(slice).unwrap();
            assert_eq!((buffer.address(), buffer.len()), (address, 3));
            cuda.copy_within(&mut buffer, 0, 1, 2).unwrap();
            assert_eq!(cuda.download(&buffer).unwrap(), [1, 1, 2]);
        }
        let empty = cuda.adopt(stream.alloc_zeros::<u32>(1).unwrap()).unwrap();
        assert_eq!(cuda.download(&empty).unwrap(), [0]);
        let base = stream.alloc_zeros::<u32>(2).unwrap().leak();
        // SAFETY: four bytes are left.
        let odd = unsafe { stream.upgrade_device_ptr::<u32>(base + 4, 1) };
        assert!(matches!(cuda.adopt(odd), Err(Error::Invalid { .. })));
        // It was dropped, and cannot be freed alone.
        assert!(context.check_err().is_err());
        // SAFETY: what was leaked above.
        drop(unsafe { stream.upgrade_device_ptr::<u32>(base, 2) });
    });
}

#[test]
fn all_kernels_can_be_loaded_at_once() {
    with_cuda(|cuda, _| {
        cuda.kernels().load_all().unwrap();
        // So that operations can be recorded that have never run.
        let gate_up = cuda.zeros(16).unwrap();
        let mut out = cuda.zeros(8).unwrap();
        let graph = cuda.record(|| cuda.swiglu(1, 8, &gate_up, &mut out));
        assert!(graph.unwrap().is_some());
    });
}

#[test]
fn an_error_of_the_driver_is_not_taken_for_a_shape_that_is_too_large() {
    // It would end all work in a GPU's context.
    with_emulator(|cuda, _| {
        let (kernels, stream) = (cuda.kernels(), cuda.stream());
        let code = |items, at| {
            let none = Fault::IGNORED;
            // SAFETY: nothing is at the address, which the emulator finds.
            let result = unsafe {
                kernels.plackett_luce_loss(stream, 1, items, 1.0, at, at, at, at, none, none)
            };
            match result {
                Err(Error::Device { code, .. }) => code,
                other => other.map(|()| None).unwrap(),
            }
        };
        // A list that fits loads the kernel and leaves an error. The next asks for so much shared
        // memory that the driver must allow it, and fails for that error.
        assert_eq!(code(2, 8), None);
        const ILLEGAL_ADDRESS: u32 = 700;
        assert_eq!(code(4096, 8), Some(ILLEGAL_ADDRESS));
    });
}

#[test]
fn threads_may_share_a_device() {
    with_cuda(|cuda, _| {
        std::thread::scope(|scope| {
            for seed in 0..4u32 {
                scope.spawn(move || {
                    let mut buffer = cuda.upload(&[seed; 100]).unwrap();
                    cuda.copy_within(&mut buffer, 0, 1, 99).unwrap();
                    assert_eq!(cuda.download(&buffer).unwrap(), [seed; 100]);
                });
            }
        });
    });
}

#[test]
fn nothing_is_left_when_a_device_is_dropped() {
    // The emulator tells when the last device is gone.
    let mut ended = None;
    with_emulator(|cuda, emulator| {
        let mut buffer = cuda.upload(&[1u8; 100]).unwrap();
        cuda.copy_within(&mut buffer, 0, 1, 99).unwrap();
        emulator.leaks().unwrap();
        ended = Some(*emulator);
    });
    assert!(ended.is_none_or(|emulator| emulator.leaks().unwrap().is_empty()));
}

#[test]
fn entries_have_unique_names() {
    for arch in MODULES.iter().map(|m| m.arch) {
        let modules = MODULES.iter().filter(|m| m.arch == arch);
        let mut names: Vec<_> = modules.flat_map(|m| m.entries).map(|e| e.name).collect();
        names.sort();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
