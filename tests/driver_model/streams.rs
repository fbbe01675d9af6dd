//! Streams, captured graphs and events.

use super::machine::{Capture, Event, Stream, Work, known, take};
use super::{R, give, inside, inside_no_capture, refused};
use cudarc::driver::sys;
use std::ffi::{c_uint, c_ulonglong};

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreate(stream: *mut sys::CUstream, _flags: c_uint) -> R {
    inside("cuStreamCreate", |m| {
        let handle = m.handle();
        m.streams.insert(handle, Stream::default());
        unsafe { give(stream, handle as sys::CUstream) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamDestroy_v2(stream: sys::CUstream) -> R {
    inside("cuStreamDestroy", |m| {
        m.drain(stream as usize)?;
        m.streams.remove(&(stream as usize));
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamSynchronize(stream: sys::CUstream) -> R {
    inside("cuStreamSynchronize", |m| m.drain(stream as usize))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamBeginCapture_v2(
    stream: sys::CUstream,
    _mode: sys::CUstreamCaptureMode,
) -> R {
    inside("cuStreamBeginCapture", |m| {
        let stream = known(&mut m.streams, stream as usize, "stream")?;
        if stream.capture.is_some() {
            return refused(
                R::CUDA_ERROR_ILLEGAL_STATE,
                "the stream is captured already",
            );
        }
        let thread = std::thread::current().id();
        stream.capture = Some(Capture {
            thread,
            works: vec![],
            broken: false,
        });
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamEndCapture(stream: sys::CUstream, graph: *mut sys::CUgraph) -> R {
    inside("cuStreamEndCapture", |m| {
        let stream = known(&mut m.streams, stream as usize, "stream")?;
        let Some(capture) = stream.capture.take() else {
            return refused(R::CUDA_ERROR_ILLEGAL_STATE, "the stream is not captured");
        };
        if capture.thread != std::thread::current().id() {
            return refused(
                R::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD,
                "a capture ended by another thread",
            );
        }
        if capture.broken {
            return Err(R::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        }
        let handle = m.handle();
        m.graphs.insert(handle, capture.works);
        unsafe { give(graph, handle as sys::CUgraph) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphInstantiateWithFlags(
    exec: *mut sys::CUgraphExec,
    graph: sys::CUgraph,
    _flags: c_ulonglong,
) -> R {
    inside("cuGraphInstantiate", |m| {
        let works = known(&mut m.graphs, graph as usize, "graph")?.clone();
        let handle = m.handle();
        m.execs.insert(handle, works);
        unsafe { give(exec, handle as sys::CUgraphExec) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphDestroy(graph: sys::CUgraph) -> R {
    inside("cuGraphDestroy", |m| {
        take(&mut m.graphs, graph as usize, "graph").map(|_| ())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphLaunch(exec: sys::CUgraphExec, stream: sys::CUstream) -> R {
    inside("cuGraphLaunch", |m| {
        let works = known(&mut m.execs, exec as usize, "executable graph")?.clone();
        works
            .into_iter()
            .try_for_each(|w| m.enqueue(stream as usize, w))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphExecDestroy(exec: sys::CUgraphExec) -> R {
    inside("cuGraphExecDestroy", |m| {
        take(&mut m.execs, exec as usize, "executable graph").map(|_| ())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventCreate(event: *mut sys::CUevent, flags: c_uint) -> R {
    inside("cuEventCreate", |m| {
        let timing = flags & sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint == 0;
        let handle = m.handle();
        m.events.insert(
            handle,
            Event {
                timing,
                recorded: 0,
                reached: 0,
                at: None,
            },
        );
        unsafe { give(event, handle as sys::CUevent) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventDestroy_v2(event: sys::CUevent) -> R {
    inside("cuEventDestroy", |m| {
        take(&mut m.events, event as usize, "event").map(|_| ())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventRecord(event: sys::CUevent, stream: sys::CUstream) -> R {
    inside("cuEventRecord", |m| {
        let e = known(&mut m.events, event as usize, "event")?;
        e.recorded += 1;
        let which = e.recorded;
        m.enqueue(stream as usize, Work::Record(event as usize, which))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamWaitEvent(
    stream: sys::CUstream,
    event: sys::CUevent,
    _flags: c_uint,
) -> R {
    inside("cuStreamWaitEvent", |m| {
        match known(&mut m.events, event as usize, "event")?.recorded {
            0 => known(&mut m.streams, stream as usize, "stream").map(|_| ()),
            which => m.enqueue(stream as usize, Work::Wait(event as usize, which)),
        }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventSynchronize(event: sys::CUevent) -> R {
    inside_no_capture("cuEventSynchronize", |m| {
        let which = known(&mut m.events, event as usize, "event")?.recorded;
        m.reach(event as usize, which)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventElapsedTime(ms: *mut f32, start: sys::CUevent, end: sys::CUevent) -> R {
    inside("cuEventElapsedTime", |m| {
        let mut at = |event: usize| {
            let e = known(&mut m.events, event, "event")?;
            match e.at {
                _ if !e.timing || e.recorded == 0 => refused(
                    R::CUDA_ERROR_INVALID_HANDLE,
                    "the time of an event that keeps none",
                ),
                Some(at) if e.reached == e.recorded => Ok(at),
                _ => Err(R::CUDA_ERROR_NOT_READY),
            }
        };
        let (start, end) = (at(start as usize)?, at(end as usize)?);
        unsafe { give(ms, end.duration_since(start).as_secs_f32() * 1e3) }
    })
}
