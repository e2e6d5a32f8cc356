//! Memory of the CUDA back end: copies in, out and within, and what is refused.
#![cfg(feature = "cuda")]

mod common {
    pub mod cuda;
}

use common::cuda::*;
use dust_kernels::cuda::MODULES;
use dust_kernels::{Buffer, Cuda, Device, Error};

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
    let emulator = cuda_emulator::install().unwrap();
    with_cuda(|cuda, _| {
        let mut buffer = cuda.upload(&[1u8; 100]).unwrap();
        cuda.copy_within(&mut buffer, 0, 1, 99).unwrap();
        emulator.leaks().unwrap();
    });
    assert_eq!(emulator.leaks().unwrap(), []);
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
